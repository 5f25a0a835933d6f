"""Steps that are worked out at once give to the last bit what one after the other gives."""

import pytest
from sim_runs import build, burst, one, talk

from jmemserve.config import Caching, Policy
from jmemserve.simulator.cluster import SimCluster
from jmemserve.simulator.instance import SimInstance
from jmemserve.simulator.load import poisson

WAYS = {
    "colocated": ("2xcolocated", {}),
    "apart": ("2xprefill+2xdecode", {}),
    "pressure": ("prefill+decode", {"kv_cache_tokens": 160}),
    "swaps": ("2xcolocated", {"kv_cache_tokens": 160, "dram": 400}),
    "nothing cached": ("2xprefill+decode", {"caching": Caching.NONE}),
    "sessions": ("prefill+2xdecode", {"policy": Policy.SESSION, "front_end_s": 0.01}),
}


def outcome(cluster: SimCluster) -> tuple:
    """All that is told of a run."""
    instances = [
        (i.steps, i.computed, i.device.busy_s, i.scheduler.plans, i.scheduler.preemptions, i.pool.stats())
        for i in cluster.instances.values()
    ]
    return cluster.outcomes, instances, cluster.network.blocks, cluster.predictions, cluster.clock.now


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_the_outcome_is_that_of_single_steps(way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, how = WAYS[way]
    found = []
    for stepwise in (False, True):
        if stepwise:
            monkeypatch.setattr(SimInstance, "_ahead", lambda self, flight: None)
        cluster = build(mesh, block_size=16, **how)
        cluster.run(poisson(40, 15.0 + 10 * seed, 40, 60, 12, seed))
        cluster.check()
        found.append(outcome(cluster))
    assert found[0] == found[1]


def test_few_events_for_many_steps() -> None:
    cluster = build("colocated", block_size=16)
    cluster.run(one(20, 600))
    assert cluster.instances["colocated0"].steps > 600 > 4 * cluster.clock.happened


@pytest.mark.parametrize("caching", list(Caching))
def test_conversations_and_bursts_too(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stepwise in (False, True):
        if stepwise:
            monkeypatch.setattr(SimInstance, "_ahead", lambda self, flight: None)
        chat, rush = build("prefill+decode", caching=caching), build("3xcolocated", caching=caching)
        chat.run(talk(5, 10, 37, pause=0.3))
        rush.run(burst(12, 24, 50, every=0.0137))
        found.append((outcome(chat), outcome(rush)))
    assert found[0] == found[1]
