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
