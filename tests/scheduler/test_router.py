"""The router: where requests go, and that its counters always come back to zero."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jmemserve.config import Bypass, Caching, Role
from jmemserve.errors import ConfigError, Unavailable
from jmemserve.kvpool.runs import HBM
from jmemserve.scheduler.policies import POLICIES
from jmemserve.scheduler.prompt_tree import Holding
from jmemserve.scheduler.router import InstanceState, Router
from jmemserve.scheduler.view import Load

PD = [("prefill0", Role.PREFILL), ("prefill1", Role.PREFILL), ("decode0", Role.DECODE), ("decode1", Role.DECODE)]
MIXED = [("prefill0", Role.PREFILL), ("colocated0", Role.COLOCATED), ("decode0", Role.DECODE)]
C = 4


TTL = 600.0


def learner(instances, **more):
    """A router that learns from responses."""
    return Router(instances, C, **{"ttl_s": TTL, **more})


def serve(router, request_id, tokens, output=(9, 9, 9, 9, 9), now=0.0):
    """One whole request; returns its route."""
    route = router.route(request_id, tokens, "", now)
    router.on_first_token(request_id, now)
    router.on_finished(request_id, (*tokens, *output), now)
    return route


def test_a_request_gets_one_of_each_role():
    route = learner(PD).route("r", [1, 2, 3], "", 0.0)
    assert (route.prefill, route.decode, route.predicted_cached_tokens) == ("prefill0", "decode0", 0)


def test_colocated_prefills_and_decodes_at_one_place():
    router = Router([("colocated0", Role.COLOCATED), ("colocated1", Role.COLOCATED)], C)
    for number in range(4):
        route = router.route(f"r{number}", [number], "", 0.0)
        assert route.prefill == route.decode == f"colocated{number % 2}"


def test_a_colocated_instance_that_prefills_decodes_too():
    router = learner(MIXED)
    routes = [router.route(f"r{number}", [*range(200)], "", 0.0) for number in range(20)]
    assert {route.prefill for route in routes} == {"prefill0", "colocated0"}
    assert all(route.decode == "colocated0" for route in routes if route.prefill == "colocated0")
    assert "decode0" in {route.decode for route in routes}


def test_a_prefix_is_followed_on_both_sides():
    router = learner(PD)
    router.route("busy", [*range(500, 600)], "", 0.0)
    first = serve(router, "a", [*range(100)])
    assert (first.prefill, first.decode) == ("prefill1", "decode1")
    router.on_finished("busy", (), 0.0)
    second = serve(router, "b", [*range(100), 7, 7])
    assert (second.prefill, second.decode, second.predicted_cached_tokens) == ("prefill1", "decode1", 100)
    router.forget()
    assert serve(router, "c", [*range(100), 7, 7]).predicted_cached_tokens == 0


def test_the_prefill_side_learns_the_prompt_and_the_decode_side_the_answer():
    for caching, at_prefill, at_decode in (
        (Caching.NONE, 0, 0),
        (Caching.PREFILL, 8, 0),
        (Caching.DELTA, 8, 16),
        (Caching.FULL, 16, 16),  # the answer comes back
    ):
        router = learner([("prefill0", Role.PREFILL), ("decode0", Role.DECODE)], caching=caching)
        serve(router, "a", [*range(8)], [*range(8, 17)])
        _, held = router.beliefs.held(router.beliefs.packed([*range(17)]), 17, "", 0.0)
        assert held.get("prefill0", Holding(0, 0)).blocks * C == at_prefill
        assert held.get("decode0", Holding(0, 0)).blocks * C == at_decode


def test_what_never_started_is_not_believed_cached():
    router = learner(PD)
    router.route("a", [*range(100)], "", 0.0)
    router.on_finished("a", [*range(100)], 0.0)
    later = 100.0  # what was promised is forgotten
    assert router.route("b", [*range(100)], "", later).predicted_cached_tokens == 0


def test_salts_do_not_share():
    router = learner(PD)
    serve(router, "a", [*range(100)])
    assert router.route("b", [*range(100)], "salt", 0.0).predicted_cached_tokens == 0


def test_beliefs_end():
    router = learner(PD, ttl_s=60.0)
    serve(router, "a", [*range(100)], now=0.0)
    assert serve(router, "b", [*range(100)], now=59.0).predicted_cached_tokens == 96
    assert serve(router, "c", [*range(100)], now=120.0).predicted_cached_tokens == 0


def test_affinity_gives_way_to_load():
    """A popular prefix spreads: who holds it does not get every request."""
    router = learner(PD)
    serve(router, "a", [*range(64)])
    routes = [router.route(f"r{number}", [*range(64), number], "", 0.0) for number in range(20)]
    assert routes[0].prefill == "prefill0"
    assert {route.prefill for route in routes} == {"prefill0", "prefill1"}


def test_a_burst_is_spread_before_any_answer_comes():
    router = learner(PD)
    routes = [router.route(f"r{number}", [number] * 50, "", 0.0) for number in range(10)]
    for place in ("prefill0", "prefill1"):
        assert sum(route.prefill == place for route in routes) == 5
    assert sum(route.decode == "decode0" for route in routes) == 5


def test_round_robin_takes_turns():
    router = learner(PD, policy="round_robin")
    routes = [serve(router, f"r{number}", [1, 2, 3]) for number in range(4)]
    assert [route.prefill for route in routes] == ["prefill0", "prefill1"] * 2


@pytest.mark.parametrize("policy", ["least_load", "cost"])
def test_what_other_front_ends_have_at_an_instance_counts(policy):
    router = Router([("colocated0", Role.COLOCATED), ("colocated1", Role.COLOCATED)], C, policy=policy)
    router.set_others("colocated0", 3)
    router.set_others("nobody", 3)
    assert {serve(router, f"r{n}", [n, *range(20)]).prefill for n in range(2)} == {"colocated1"}
    router.set_others("colocated0", 0)
    assert serve(router, "r", [5, *range(20)]).prefill == "colocated0"
    router.check()


def test_least_load_ignores_the_cache():
    router = learner(PD, policy="least_load")
    serve(router, "a", [*range(100)])
    router.route("b", [5], "", 0.0)
    assert router.route("c", [*range(100)], "", 0.0).prefill == "prefill1"


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match="cost, longest_prefix, session, least_load, round_robin"):
        learner(PD, policy="random")


def test_other_roles_are_asked_when_none_of_the_right_one_is_left():
    router = learner(PD)
    for name in ("decode0", "decode1"):
        router.set_state(name, InstanceState.DEAD)
    route = router.route("a", [1], "", 0.0)
    assert route.prefill == route.decode == "prefill0"
    for name in ("prefill0", "prefill1"):
        router.set_state(name, InstanceState.DRAINING)
    with pytest.raises(Unavailable):
        router.route("b", [1], "", 0.0)
    router.set_state("decode1", InstanceState.READY)
    route = router.route("b", [1], "", 0.0)
    assert route.prefill == route.decode == "decode1"


def test_lesson_18_a_flapping_instance_has_no_ghost_loads():
    router = learner(PD)
    serve(router, "warm", [*range(100)])
    route = router.route("a", [*range(100)], "", 0.0)
    router.on_first_token("a", 0.0)
    second = router.route("b", [*range(100)], "", 0.0)
    assert route.prefill == second.prefill == "prefill0"
    for name, _ in PD:
        router.set_state(name, InstanceState.DEAD)
        assert router.load(name) == Load(0, 0)
        router.set_state(name, InstanceState.READY)
    router.route("c", [*range(100)], "", 0.0)
    before = [router.load(name) for name, _ in PD]
    router.on_first_token("b", 0.0)
    for request_id in ("a", "b"):
        router.on_finished(request_id, [*range(105)], 0.0)
        router.on_finished(request_id, [*range(105)], 0.0)
    assert [router.load(name) for name, _ in PD] == before
    router.on_finished("c", (), 0.0)
    assert all(router.load(name) == Load(0, 0) for name, _ in PD)
    assert router.route("d", [*range(100)], "", 100.0).predicted_cached_tokens == 0  # the new lives have cold caches
    router.check()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_histories(data):
    """Never to an instance that is not ready; equal histories give equal routes; counters end at zero; bounded."""
    instances = data.draw(st.sampled_from([PD, MIXED]))
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    bypass, ttl_s = data.draw(st.sampled_from(list(Bypass))), data.draw(st.sampled_from([None, 5.0]))
    routers = [Router(instances, C, policy, bypass=bypass, ttl_s=ttl_s) for _ in range(2)]
    states = {name: InstanceState.READY for name, _ in instances}
    flights, now = {}, 0.0
    for number in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["route", "route", "first", "finish", "state", "wait"]))
        if what == "route":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=40))
            request_id = f"r{number}"
            if InstanceState.READY not in states.values():
                for router in routers:
                    with pytest.raises(Unavailable):
                        router.route(request_id, tokens, "", now)
                continue
            session = data.draw(st.sampled_from(["", "one"]))
            one, other = (router.route(request_id, tokens, "", now, session) for router in routers)
            assert one == other
            assert states[one.prefill] is states[one.decode] is InstanceState.READY
            assert 0 <= one.predicted_cached_tokens < len(tokens)
            assert one.source is None or one.source in states and one.source != one.prefill
            flights[request_id] = tokens
        elif what == "state":
            name, state = data.draw(st.sampled_from(sorted(states))), data.draw(st.sampled_from(InstanceState))
            states[name] = state
            for router in routers:
                router.set_state(name, state)
        elif what == "wait":
            now += data.draw(st.sampled_from([0.5, 3.0]))
        elif flights:
            request_id = data.draw(st.sampled_from(sorted(flights)))
            for router in routers:
                if what == "first":
                    router.on_first_token(request_id, now)
                else:
                    router.on_finished(request_id, [*flights[request_id], 1, 1, 1], now)
            if what == "finish":
                del flights[request_id]
        for router in routers:
            router.check()
    for router in routers:
        assert len(router) == len(flights)
        for request_id in flights:
            router.on_finished(request_id, (), now)
        assert len(router) == 0 and all(router.load(name) == Load(0, 0) for name, _ in instances)


def test_a_short_uncached_prompt_is_prefilled_where_it_is_decoded():
    instances = [("prefill0", Role.PREFILL), ("decode0", Role.DECODE)]
    for bypass, short_at in ((Bypass.OFF, "prefill0"), (Bypass.AUTO, "decode0")):
        router = Router(instances, C, bypass=bypass)
        assert router.route("short", [*range(20)], "", 0.0).prefill == short_at
        assert router.route("long", [*range(1000)], "", 0.0).prefill == "prefill0"
        router.check()


def test_a_busy_decode_instance_is_not_bothered_with_prompts():
    router = Router([("prefill0", Role.PREFILL), ("decode0", Role.DECODE)], C, bypass=Bypass.AUTO)
    for number in range(8):
        router.route(f"r{number}", [*range(1000 * number, 1000 * number + 300)], "", 0.0)
        router.on_first_token(f"r{number}", 0.0)
    assert router.route("short", [*range(7, 107)], "", 0.0).prefill == "prefill0"


def test_instances_come_go_and_change_their_role():
    router = learner(())
    with pytest.raises(Unavailable):
        router.route("r", [1], "", 0.0)
    router.add("a", Role.PREFILL)
    router.add("b", Role.DECODE)
    serve(router, "one", [*range(16)])
    router.set_role("a", Role.DECODE)
    router.set_role("b", Role.PREFILL)
    route = serve(router, "two", [*range(16), 3])
    assert (route.prefill, route.decode) == ("b", "a")
    assert route.predicted_cached_tokens == 16, "what it holds stays known"
    assert router.relief([*range(16)], "", "a", 0.0) == "b"
    router.remove("a")
    assert serve(router, "three", [*range(16)]).decode == "b"
    assert router.relief([1], "", "b", 0.0) is None
    router.check()


def test_decode_instances_send_prefixes_only_where_what_they_make_goes_back():
    instances = [("prefill0", Role.PREFILL), ("decode0", Role.DECODE)]
    for caching, source in ((Caching.DELTA, None), (Caching.FULL, "decode0")):
        router = learner(instances, caching=caching)
        router.beliefs.learn("decode0", Role.DECODE, range(4000), "", 0.0)
        route = router.route("r", [*range(4001)], "", 0.0)
        assert (route.prefill, route.source) == ("prefill0", source)


def test_what_is_still_to_be_computed_is_nobodys_source():
    """A burst of equal prompts: the second instance cannot get from the first what that has not computed."""
    router = Router([("prefill0", Role.PREFILL), ("prefill1", Role.PREFILL), ("decode0", Role.DECODE)], C)
    routes = [router.route(f"r{number}", [*range(4000)], "", 0.0) for number in range(60)]
    assert {route.prefill for route in routes} == {"prefill0", "prefill1"}
    assert all(route.source is None for route in routes)
    for number in range(60):
        router.on_finished(f"r{number}", (), 0.0)
    assert router.route("later", [*range(4000)], "", 0.0).predicted_cached_tokens == 0, "nothing was computed"
    router.check()


def test_what_came_to_nothing_promises_nothing_but_what_others_wait_for():
    router = Router([("colocated0", Role.COLOCATED)], C)
    shared = [*range(400)]
    router.route("long", [*shared, *range(1000, 1400)], "", 0.0)
    router.route("gone", [*shared, *range(2000, 2400)], "", 0.0, "session")
    router.on_finished("gone", (), 0.0)
    router.check()
    again = router.route("again", [*shared, *range(2000, 2400)], "", 0.0, "session")
    assert again.predicted_cached_tokens == 400
    router.on_finished("long", (), 0.0)
    router.on_finished("again", (), 0.0)
    router.check()
    assert router.route("new", shared, "", 0.0).predicted_cached_tokens == 0


def test_a_session_whose_request_was_refused_is_where_it_was():
    router = Router([("a", Role.COLOCATED), ("b", Role.COLOCATED)], C, "session")
    home = router.route("one", [1, 2], "", 0.0, "s")
    router.on_first_token("one", 0.0)
    router.set_state(home.prefill, InstanceState.DRAINING)
    other = router.route("two", [1, 2], "", 0.0, "s")
    assert other.prefill != home.prefill
    router.on_finished("two", (), 0.0)
    router.set_state(home.prefill, InstanceState.READY)
    assert router.route("three", [1, 2], "", 0.0, "s").prefill == home.prefill


def test_a_source_that_had_not_what_was_believed_is_doubted_and_not_who_asked_it():
    router = Router([("prefill0", Role.PREFILL), ("decode0", Role.DECODE)], C)
    tree, raw = router.beliefs.tree, router.beliefs.packed(range(4000))
    tree.hold(tree.slots["decode0"], HBM, tree.root(b"\0"), 0, raw)
    for number in range(4):
        route = router.route(f"r{number}", [*range(4001)], "", 0.0)
        assert (route.prefill, route.source) == ("prefill0", "decode0")
        router.on_first_token(f"r{number}", 0.0)
        router.on_finished(f"r{number}", [*range(4002)], 0.0, cached=0)
        router.beliefs.withdraw("prefill0", router.beliefs.packed(range(4001)), "", ())
    assert router.beliefs.wanted(1.0) == ["decode0"]


@pytest.mark.parametrize("ttl_s", [None, TTL])
def test_a_tree_that_mispredicts_is_made_anew(ttl_s):
    """By a snapshot; what was learnt from responses is forgotten. Too little is wrong only where nothing times out."""
    router = Router([("colocated0", Role.COLOCATED)], C, ttl_s=ttl_s)
    for number in range(4):
        serve(router, f"r{number}", [*range(400)])
    for _ in range(4):
        router.beliefs.compare("colocated0", 0, 400, 401)
    assert router.beliefs.wanted(1.0) == (["colocated0"] if ttl_s is None else [])
    for _ in range(4):
        router.beliefs.compare("colocated0", 400, 0, 401)
    assert router.beliefs.wanted(100.0) == (["colocated0"] if ttl_s is None else [])
    assert router.beliefs.tree.num_blocks == 0
    router.check()


def test_moved_requests_count_where_they_go():
    instances = [("p", Role.PREFILL), *((f"d{n}", Role.DECODE) for n in range(4))]
    router = Router(instances, C)
    prompts = {f"r{n}": [*range(1000 * n, 1000 * n + 100)] for n in range(12)}
    for request_id, prompt in prompts.items():
        router.route(request_id, prompt, "", 0.0)
        router.on_first_token(request_id, 0.0)
    assert [router.load(f"d{n}").running for n in range(4)] == [3, 3, 3, 3]
    router.set_state("d0", InstanceState.DRAINING)
    for request_id, prompt in prompts.items():
        if router._flights[request_id].decode.name == "d0":
            router.moved(request_id, router.relief(prompt, "", "d0", 0.0))
            router.check()
    assert [router.load(f"d{n}").running for n in range(4)] == [0, 4, 4, 4]
    router.moved("nobody", "d1")
    router.moved("r1", "nobody")
    router.route("new", [5], "", 0.0)
    router.moved("new", "p")  # it is to stay where it is prefilled
    router.check()
    for request_id in (*prompts, "new"):
        router.on_finished(request_id, (), 0.0)
    assert all(router.load(name) == Load() for name, _ in instances)
