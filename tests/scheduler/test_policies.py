"""Policies: pure functions from a request and a view to a route. The cost policy against a search of all routes."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jmemserve.config import Role
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.cost_routing import TURNS, decode_there
from jmemserve.scheduler.kinds import Kinds
from jmemserve.scheduler.policies import POLICIES
from jmemserve.scheduler.prompt_tree import Holding
from jmemserve.scheduler.view import NOTHING, Asked, Candidate, Load, View

C = 16
PROFILE = Profile(
    steps=((1, 1, 0.010), (8, 8, 0.014), (64, 8, 0.020), (512, 8, 0.100)),
    pair_s=1e-8,
    context_s=1e-7,
    transfer_call_s=0.002,
    transfer_block_s=0.0002,
    swap_call_s=0.001,
    swap_block_s=0.0001,
)
COSTS = CostModel(PROFILE)


def one(name, role=Role.PREFILL, costs=COSTS, **load):
    return Candidate(name, role, costs, True, load=Load(**load), slots=8)


def view(*candidates, held=None, bypass=False, turn=0):
    prefill = [c for c in candidates if c.role.prefills] or list(candidates)
    decode = [c for c in candidates if c.role.decodes] or list(candidates)
    return View(prefill, decode, held or {}, C, turn, bypass, held or {})


def cost(asked, seen):
    return POLICIES["cost"](asked, seen)


def test_the_least_queue_and_prefill_wins():
    """The paper's rule: a held prefix is worth what computing it costs, no more."""
    p0, p1, d0 = one("p0", pending_s=0.05), one("p1"), one("d0", Role.DECODE)
    held = {"p0": Holding(30, 0)}
    dear = Profile(**{f: getattr(PROFILE, f) for f in ("steps", "pair_s", "context_s")}, transfer_call_s=9.0)
    for candidate in (p0, p1, d0):
        candidate.costs = CostModel(dear)  # nothing is worth a pull
    assert cost(Asked(512, 10), view(p0, p1, d0, held=held)).prefill == "p0"
    p0.load.pending_s = 0.5
    assert cost(Asked(512, 10), view(p0, p1, d0, held=held)).prefill == "p1"


def test_a_peer_sends_what_is_cheaper_to_move_than_to_compute():
    p0, p1, d0 = one("p0", pending_s=3.0), one("p1"), one("d0", Role.DECODE)  # p0 waits for something
    route = cost(Asked(513, 10), view(p0, p1, d0, held={"p0": Holding(32, 0)}))
    assert (route.prefill, route.source, route.source_blocks) == ("p1", "p0", 32), "hot prefixes spread"
    assert route.predicted_cached_tokens == 512
    assert route.predicted_ttft_s == pytest.approx(COSTS.transfer_s(32) + COSTS.prefill_s(513, 512))
    few = cost(Asked(33, 10), view(p0, p1, d0, held={"p0": Holding(2, 0)}))
    assert few.prefill == "p1" and few.source is None, "two blocks are computed in the time of a call"


def test_of_all_who_could_send_the_one_that_can_begin_first_does():
    held = {name: Holding(32, 0) for name in ("p0", "p1", "p2")}
    p0, p1 = one("p0", pending_s=3.0, sending_s=0.03), one("p1", pending_s=3.0, sending_s=0.01)
    p2, p3, d0 = one("p2", pending_s=3.0, sending_s=0.02), one("p3"), one("d0", Role.DECODE)
    asked, seen = Asked(513, 10), view(p0, p1, p2, p3, d0, held=held)
    route = cost(asked, seen)
    assert (route.prefill, route.source) == ("p3", "p1")
    for candidate in (p0, p1, p2):
        candidate.load.pending = 4000  # their loops turn slowly: asking takes longer than computing
    assert cost(asked, seen).source is None
    for candidate in (p0, p1, p2):
        candidate.load.pending, candidate.load.sending_s = 0, 1.0
    assert cost(asked, seen).source is None, "their links are taken"


def test_where_few_are_idle_nothing_is_computed_twice():
    p0, p1, d0 = one("p0", pending_s=0.09), one("p1"), one("d0", Role.DECODE)
    for candidate in (p0, p1, d0):
        candidate.costs = CostModel(dataclasses.replace(PROFILE, transfer_call_s=9.0))
    others = [one(f"p{number}") for number in range(2, 6)]
    asked, held = Asked(513, 10), {"p0": Holding(32, 0)}
    assert cost(asked, view(p0, p1, *others, d0, held=held)).prefill != "p0"
    for candidate in (p0, *others):
        candidate.load.pending = 1
    assert cost(asked, view(p0, p1, *others, d0, held=held)).prefill == "p0"


def test_a_decode_instance_may_be_the_source():
    p0, d0 = one("p0"), one("d0", Role.DECODE)
    assert cost(Asked(513, 10), view(p0, d0, held={"d0": Holding(32, 0)})).source == "d0"


def test_what_is_kept_back_is_nobodys_source():
    p0, d0, d1 = one("p0", Role.PREFILL), one("d0", Role.DECODE), one("d1", Role.DECODE)
    found = view(p0, d0, d1, held={"d0": Holding(32, 0), "d1": Holding(16, 0)})
    route = cost(Asked(513, 10), dataclasses.replace(found, sources={}))
    assert (route.source, route.predicted_cached_tokens) == (None, 0)
    assert cost(Asked(513, 10), dataclasses.replace(found, sources={"d1": Holding(16, 0)})).source == "d1"


def test_what_lies_in_dram_is_swapped_in_where_that_is_cheaper():
    p0, d0 = one("p0"), one("d0", Role.DECODE)
    route = cost(Asked(513, 10), view(p0, d0, held={"p0": Holding(32, 32)}))
    assert route.predicted_cached_tokens == 512
    assert route.predicted_ttft_s == pytest.approx(COSTS.swap_in_s(32) + COSTS.prefill_s(513, 512))
    slow = CostModel(Profile(PROFILE.steps, swap_block_s=1.0))
    route = cost(Asked(513, 10), view(one("p0", costs=slow), d0, held={"p0": Holding(32, 32)}))
    assert route.predicted_cached_tokens == 0


def test_the_decode_instance_that_lacks_less_and_runs_less_wins():
    p0, d0, d1 = one("p0"), one("d0", Role.DECODE), one("d1", Role.DECODE)
    assert cost(Asked(512, 10), view(p0, d0, d1, held={"d1": Holding(31, 0)})).decode == "d1"
    d1.load.running = 7
    assert cost(Asked(512, 100), view(p0, d0, d1, held={"d1": Holding(31, 0)})).decode == "d0"
    full, half = one("d0", Role.DECODE, running=8), one("d1", Role.DECODE, running=4)
    assert cost(Asked(16, 10), view(p0, full, half)).decode == "d1"


def test_a_short_prompt_bypasses_an_idle_decode_instance_only():
    p0, d0 = one("p0", pending_s=0.2), one("d0", Role.DECODE, running=1)
    assert cost(Asked(40, 10), view(p0, d0)).prefill == "p0"
    assert cost(Asked(40, 10), view(p0, d0, bypass=True)).prefill == "d0"
    d0.load.running = 7
    assert cost(Asked(512, 10), view(p0, d0, bypass=True)).prefill == "p0", "seven streams would stand still"


def test_costs_that_are_not_known_refuse_nothing():
    p0 = one("p0", Role.COLOCATED, pending_s=1e6)
    p0.measured = False
    assert cost(Asked(40, 10), view(p0)).predicted_ttft_s == 0.0


def test_longest_prefix_follows_the_prefix_until_it_is_a_hot_spot():
    p0, p1, d0 = one("p0", pending=2000), one("p1"), one("d0", Role.DECODE)
    longest, held = POLICIES["longest_prefix"], {"p0": Holding(1, 0)}
    assert longest(Asked(512, 10), view(p0, p1, d0, held=held)).prefill == "p0"
    p0.load.pending = 5000
    assert longest(Asked(512, 10), view(p0, p1, d0, held=held)).prefill == "p1"


def test_a_session_stays_where_it_is():
    p0, p1, d0 = one("p0", pending=2000), one("p1"), one("d0", Role.DECODE)
    session = POLICIES["session"]
    assert session(Asked(512, 10, ("p0", "d0")), view(p0, p1, d0)).prefill == "p0"
    assert session(Asked(512, 10), view(p0, p1, d0)).prefill == "p1"
    assert session(Asked(512, 10, ("gone", "d0")), view(p0, p1, d0)).prefill == "p1"


def test_round_robin_takes_turns_on_both_sides():
    seen = [one("p0"), one("p1"), one("d0", Role.DECODE), one("d1", Role.DECODE)]
    robin = POLICIES["round_robin"]
    assert [robin(Asked(5, 1), view(*seen, turn=turn)).decode for turn in range(3)] == ["d0", "d1", "d0"]


def _slow_cost(asked, seen):
    """The same by looking at every pair."""
    most = max([h.blocks for h in seen.held.values()], default=0)
    best = float("inf")
    crowd = sum(c.load.pending > 0 for c in seen.prefill) / len(seen.prefill)

    def begins(c):
        busy = c.costs.decode_step_s(min(c.load.running, c.slots), c.load.context) if c.load.running else 0.0
        return c.load.sending_s + TURNS * c.pace * (c.costs.longest_step_s if c.load.pending else busy)

    everybody = {c.name: c for c in (*seen.prefill, *seen.decode)}
    delay = min(
        [begins(everybody[n]) for n, h in seen.held.items() if h.blocks == most and n in everybody], default=0.0
    )

    def first_token(c):
        blocks, dram = seen.held.get(c.name, NOTHING)
        swap = c.costs.swap_in_s(dram)
        arms = [
            (swap, c.costs.prefill_s(asked.tokens, blocks * C)),
            (0.0, c.costs.prefill_s(asked.tokens, (blocks - dram) * C)),
        ]
        if most > blocks:
            fetch = delay + c.costs.transfer_s(most - blocks) + swap
            arms.append((fetch, c.costs.prefill_s(asked.tokens, most * C)))
        fetch, compute = min(arms, key=sum)
        stalls = c.load.running if c.role.decodes else 0
        return max(c.load.pending_s, fetch) + c.pace * compute * (1 + stalls + crowd)

    for p in seen.prefill:
        for d in [p] if p.role.decodes else [d for d in seen.decode if d.role.decodes] or [p]:
            lacking = 0 if p is d else -(-asked.tokens // C) - seen.held.get(d.name, NOTHING).blocks
            best = min(best, first_token(p) + decode_there(asked, d, lacking))
    if seen.bypass:
        best = min([best, *(first_token(d) + decode_there(asked, d, 0) for d in seen.decode if d.role.decodes)])
    return best, first_token


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_cost_finds_the_cheapest_of_all_routes(data):
    count, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 700))
    candidates, held = [], {}
    for number in range(count):
        load = {"pending_s": data.draw(st.floats(0, 1)), "running": data.draw(st.integers(0, 10))}
        load |= {"pending": data.draw(st.integers(0, 1)), "sending_s": data.draw(st.floats(0, 0.1))}
        candidates.append(
            one(f"i{number}", data.draw(st.sampled_from(Role)), context=data.draw(st.integers(0, 999)), **load)
        )
        candidates[-1].pace = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
        blocks = data.draw(st.integers(0, (tokens - 1) // C))
        if blocks:
            held[f"i{number}"] = Holding(blocks, data.draw(st.integers(0, blocks)))
    seen = view(*candidates, held=held, bypass=data.draw(st.booleans()))
    asked = Asked(tokens, data.draw(st.floats(1, 500)))
    route = cost(asked, seen)
    best, first_token = _slow_cost(asked, seen)
    by_name = {c.name: c for c in candidates}
    p, d = by_name[route.prefill], by_name[route.decode]
    lacking = 0 if p is d else -(-tokens // C) - held.get(d.name, NOTHING).blocks
    assert first_token(p) + decode_there(asked, d, lacking) == pytest.approx(best)
    assert route == cost(asked, seen), "equal views give equal routes"


def test_instances_of_one_kind_share_a_model_and_have_a_pace_of_their_own():
    kinds = Kinds()
    model, pace = kinds.place("a", PROFILE)
    assert pace == 1.0
    slower = dataclasses.replace(
        PROFILE,
        steps=tuple((t, s, 1.5 * x) for t, s, x in PROFILE.steps),
        pair_s=1.5 * PROFILE.pair_s,
        context_s=1.5 * PROFILE.context_s,
    )
    assert kinds.place("b", slower) == (model, pytest.approx(1.5))
    bent = dataclasses.replace(PROFILE, steps=(*PROFILE.steps[:-1], (512, 8, 0.9)))
    other, pace = kinds.place("c", bent)
    assert other is not model and pace == 1.0
    assert kinds.place("d", dataclasses.replace(PROFILE, steps=PROFILE.steps[1:]))[0] not in (model, other)


@pytest.mark.parametrize("name", ["pair_s", "context_s", "transfer_call_s", "transfer_block_s", "swap_block_s"])
def test_what_costs_far_more_to_move_or_to_attend_is_another_kind(name):
    kinds = Kinds()
    model, _ = kinds.place("a", PROFILE)
    dear = dataclasses.replace(PROFILE, **{name: 100 * getattr(PROFILE, name) + 1e-4})
    other, pace = kinds.place("b", dear)
    assert other.profile == dear and pace == 1.0
    assert kinds.place("a", dear)[0] is other and len(kinds) == 1, "nobody has the first one any more"
    kinds.leave("a")
    kinds.leave("b")
    assert len(kinds) == 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_says_when_the_first_token_will_come(name):
    """For who asks for a limit: what waits there, and the prompt without what is cached."""
    p0, d0 = one("p0", pending_s=3.0), one("d0", Role.DECODE)
    route = POLICIES[name](Asked(513, 10, ("p0", "d0")), view(p0, d0, held={"p0": Holding(32, 0)}))
    assert route.predicted_ttft_s == pytest.approx(3.0 + COSTS.prefill_s(513, 512))
