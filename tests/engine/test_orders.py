"""Numbers that are counted up are those that would be made anew."""

import numpy as np
import pytest

from jmemserve.engine.orders import Orders
from jmemserve.kvpool import BlockPool
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import step_shapes
from jmemserve.scheduler.sequence import Sequence
from jmemserve.types import Request, SamplingParams

SIZE, LONGEST = 4, 128


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_a_repeated_order_is_the_one_made_anew(temperature: float, min_tokens: int) -> None:
    scheduler = LocalScheduler(BlockPool("a", 1, 80, SIZE), step_shapes(True, True, 4, 64))
    orders = Orders(LONGEST // SIZE, SIZE, LONGEST)
    for number in range(3):
        params = SamplingParams(temperature=temperature, max_tokens=30 + number, min_tokens=min_tokens)
        prompt = tuple(range(3 + number))
        scheduler.submit(Sequence(Request(str(number), prompt, params, number, frozenset([99])), list(prompt)))
    flight, repeated = None, 0
    while (plan := scheduler.plan(0.0)) is not None or flight is not None:
        if plan is not None:
            order, fresh = orders.make(plan), Orders(LONGEST // SIZE, SIZE, LONGEST).make(plan)
            repeated += plan.repeats > 0
            assert (order.shape, order.describe) == (fresh.shape, fresh.describe)
            np.testing.assert_array_equal(order.ints, fresh.ints)
            for ours, theirs in ((order.draw, fresh.draw), (order.penalties, fresh.penalties)):
                assert (ours is None) == (theirs is None)
                for one, other in zip(ours or (), theirs or (), strict=True):
                    np.testing.assert_array_equal(one, other)
        if flight is not None:
            scheduler.commit(flight, [7] * 4, 1.0)
        flight = plan
    assert repeated > 20
