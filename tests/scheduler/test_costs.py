"""Swapping or computing again: whichever the measurements say."""

from jmemserve.scheduler.costs import ENOUGH, CostMeter, SwapCosts


def test_unknown_costs_favour_what_is_there() -> None:
    meter = CostMeter()
    assert meter.costs() == SwapCosts() and SwapCosts().worth(1000, 1)
    for _ in range(ENOUGH):
        meter.step(100, 1.0)
    assert meter.costs() == SwapCosts()  # nothing is known of swaps


def test_the_cheaper_way_wins() -> None:
    meter = CostMeter()
    for _ in range(ENOUGH):
        meter.step(100, 1.0)  # 10 ms per token
        meter.swap(4, 0.4)  # 100 ms per block
    costs = meter.costs()
    assert costs.worth(1, 16) and costs.worth(1, 10) and not costs.worth(1, 9)
    for _ in range(100):
        meter.swap(1, 1.0)
    assert not meter.costs().worth(1, 16)


def test_where_padding_is_free_a_step_costs_what_its_tokens_cost() -> None:
    steps = ((1, 1, 0.010), (8, 8, 0.014), (64, 8, 0.020), (512, 8, 0.100))
    plain, free = CostModel(Profile(steps)), CostModel(Profile(steps, padding_free=True))
    for shape, rows in (
        (StepShape(64, 8), [(0, 64)]),
        (StepShape(512, 8), [(0, 512)]),
        (StepShape(8, 8), [(5, 1)] * 8),
    ):
        assert plain.rows_s(shape, rows) == free.rows_s(shape, rows), "a full step"
    assert plain.rows_s(StepShape(512, 8), [(0, 288)]) == 0.100
    assert free.rows_s(StepShape(512, 8), [(0, 288)]) == pytest.approx(0.060)
    assert free.rows_s(StepShape(8, 8), [(3, 1)]) == pytest.approx(0.010)
    assert free.prefill_s(600, 584) < plain.prefill_s(600, 584) == 0.020
    assert Profile.from_json(free.profile.to_json()) == free.profile
    times = [free.prefill_s(tokens, 0) for tokens in range(1, 1200)]
    assert all(0 < one <= other for one, other in zip(times, times[1:], strict=False))
