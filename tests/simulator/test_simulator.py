"""Modelled instances take what the cost model says, move what the paper says, and leave nothing behind."""

import dataclasses

import pytest
from sim_runs import PROFILE, build, burst, one, simulate, talk

from jmemserve.config import Caching
from jmemserve.scheduler.cost_model import CostModel
from jmemserve.scheduler.plan import StepShape
from jmemserve.simulator.clock import Clock, Device, Host
from jmemserve.simulator.load import poisson

COSTS = CostModel(PROFILE)


@pytest.mark.parametrize("prompt, output", [(7, 1), (40, 5), (150, 9)])
def test_one_request_on_an_idle_instance_takes_what_its_steps_take(prompt: int, output: int) -> None:
    cluster = simulate("colocated", one(prompt, output))
    outcome, instance = cluster.outcomes[0], cluster.instances["colocated0"]
    first, done = 0.0, 0
    while done < prompt:
        length = min(64, prompt - done)
        if 16 < length < 64 and length - 16 <= 16:
            length = 16  # the rest goes into another small step
        packed = StepShape(16 if length <= 16 else 64, 4)
        first += COSTS.step_s(packed, length, length * done + length * (length + 1) // 2, 0)
        done += length
    rest = sum(COSTS.decode_step_s(1, prompt + place) for place in range(1, output))
    assert outcome.ttft == pytest.approx(first)
    assert outcome.jct == pytest.approx(first + rest)
    assert (outcome.tokens, outcome.cached, instance.computed) == (output, 0, prompt + output - 1)
    assert instance.device.busy_s == pytest.approx(first + rest)


def test_a_hand_over_takes_its_transfer_besides() -> None:
    """Nothing else runs, so messages wait for nobody: the prompt, the blocks' way, the other tokens."""
    alone = simulate("colocated", one(40, 9)).outcomes[0]
    apart = simulate("prefill+decode", one(40, 9))
    assert apart.outcomes[0].ttft == alone.ttft
    assert apart.outcomes[0].jct == pytest.approx(alone.jct + COSTS.transfer_s(10))
    assert apart.network.blocks[("prefill0", "decode0")] == 10


@pytest.mark.parametrize("caching", list(Caching))
def test_each_milestone_computes_and_moves_what_the_paper_says(caching: Caching) -> None:
    """Turn k has x_k = x_(k-1) + g + u tokens (table 4), in whole blocks of C, as only those are cached."""
    user, answer, turns, size = 10, 13, 5, 4
    cluster = build("prefill+decode", caching=caching)
    moved: list[tuple[int, int]] = []

    def count() -> None:
        blocks = cluster.network.blocks
        moved.append((blocks.get(("prefill0", "decode0"), 0), blocks.get(("decode0", "prefill0"), 0)))

    cluster.run(talk(turns, user, answer, pause=5.0, said=lambda turn: count()))
    cluster.check()
    count()
    at_decode = cached = x = 0
    for turn, outcome in enumerate(cluster.outcomes):
        x += user
        whole, everything = x // size, (x + answer - 1) // size  # the last token was never fed back
        assert outcome.cached == (cached if caching is not Caching.NONE else 0)
        forward, back = (after - before for after, before in zip(moved[turn + 1], moved[turn], strict=True))
        assert forward == -(-x // size) - (at_decode if caching in (Caching.DELTA, Caching.FULL) else 0)
        assert back == (everything - whole if caching is Caching.FULL else 0)
        at_decode = everything
        cached = (everything if caching is Caching.FULL else whole) * size
        x += answer


@pytest.mark.parametrize("mesh", ["2xcolocated", "prefill+2xdecode", "2xprefill+decode"])
@pytest.mark.parametrize("dram", [0, 512])
def test_nothing_is_left_behind_under_pressure(mesh: str, dram: int) -> None:
    """Pools far too small for all at once: preemptions, refused hand-overs, evictions, swaps."""
    cluster = simulate(mesh, burst(60, 60, 30, 0.01), dram=dram, kv_cache_tokens=240)
    assert [outcome.tokens for outcome in cluster.outcomes] == [30] * 60
    assert sum(instance.scheduler.preemptions for instance in cluster.instances.values()) > 0
    assert sum(outcome.cached for outcome in cluster.outcomes) > 0


def test_equal_inputs_give_equal_outputs() -> None:
    def run(seed: int) -> list[dict]:
        cluster = simulate("2xprefill+2xdecode", poisson(80, 30.0, 50, 12, 20, seed), kv_cache_tokens=400)
        return [dataclasses.asdict(outcome) for outcome in cluster.outcomes]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_does_not_fit_is_refused_in_words() -> None:
    cluster = simulate("colocated", one(1000, 100))
    assert cluster.outcomes[0].error == "1000 + 100 tokens do not fit into a pool of 1024"
    cluster = simulate("colocated", burst(30, 60, 30, 0.0), max_queue=4)
    assert sum("--max-queue" in outcome.error for outcome in cluster.outcomes) == 26


def test_devices_that_share_cores_slow_each_other() -> None:
    """Two jobs of 1 s and 3 s on one core: the first ends at 2, the second at 4; then a third begins at 6 alone."""
    clock, ends = Clock(), []
    host = Host(clock, cores=1)
    one, other = Device(host, clock), Device(host, clock)
    one.enqueue(1.0, lambda: ends.append(clock.now))
    other.enqueue(3.0, lambda: ends.append(clock.now))
    clock.at(6.0, lambda: one.enqueue(0.5, lambda: ends.append(clock.now)))
    while clock.step():
        pass
    assert ends == pytest.approx([2.0, 4.0, 6.5])
    assert (one.busy_s, other.busy_s) == pytest.approx((2.5, 4.0))


def test_cores_shared_by_all_make_a_run_longer() -> None:
    apart, shared = (simulate("2xcolocated", burst(20, 40, 20, 0.001), cores=cores) for cores in (None, 1.0))
    assert 1.2 * apart.clock.now < shared.clock.now < 2.2 * apart.clock.now


def test_what_the_front_end_takes_is_waited_for_on_every_turn() -> None:
    bare, cluster = (build("prefill+decode", front_end_s=seconds) for seconds in (0.0, 0.25))
    for one_of in (bare, cluster):
        one_of.run(talk(3, 10, 13, pause=5.0))
    for without, outcome in zip(bare.outcomes, cluster.outcomes, strict=True):
        assert outcome.ttft == pytest.approx(without.ttft + 0.25)
        assert outcome.jct == pytest.approx(without.jct + 0.25)
    assert cluster.outcomes[1].arrival == pytest.approx(cluster.outcomes[0].last + 5.0)
