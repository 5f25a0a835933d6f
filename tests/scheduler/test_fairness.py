"""The order of service: shares in proportion to weights, priorities as head starts, and nothing that grows."""

import dataclasses
import heapq
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.scheduler.fairness import EXPECTED_OUTPUT, LEVEL_TOKENS, MAX_IDLE, OUTPUT_COST, FairShare, order
from jmemserve.types import Request, SamplingParams


def request(
    number: int, tenant: str = "", tokens: int = 1, limit: int | None = 1, priority: int = 0, follows: str = ""
) -> Request:
    params = SamplingParams(max_tokens=limit)
    arrival = float(number)
    name = f"r{number}"
    return Request(name, (1,) * tokens, params, 0, tenant=tenant, priority=priority, arrival=arrival, follows=follows)


class Server:
    """Serves one request at a time, always the first in order."""

    def __init__(self, **weights: float):
        self.shares = FairShare(weights)
        self.line: list[tuple[tuple, Request]] = []
        self.served: dict[str, float] = {}  # work by tenant
        self.turns: list[Request] = []

    def submit(self, wanted: Request) -> None:
        ranked = dataclasses.replace(wanted, rank=self.shares.enter(wanted))
        heapq.heappush(self.line, (order(ranked), ranked))

    def serve(self) -> Request:
        _, first = heapq.heappop(self.line)
        self.shares.begin(first.id)
        made = first.params.max_tokens or 1
        self.served[first.tenant] = self.served.get(first.tenant, 0) + len(first.prompt) + OUTPUT_COST * made
        self.shares.leave(first.id, made)
        self.turns.append(first)
        return first


sizes = st.lists(st.integers(1, 200), min_size=30, max_size=30)


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, st.sampled_from([0.5, 1.0, 2.0, 5.0]), st.integers(0, 20), st.randoms())
def test_two_tenants_that_flood_are_served_by_weight(mine, others, weight: float, head: int, rng) -> None:
    """Golestani's and Goyal's bound: between any two moments shares differ by a request of each at most."""
    server = Server(a=weight)
    numbers = itertools.count()
    for size in mine[:head]:  # it is there first, and has been served alone
        server.submit(request(next(numbers), "a", size))
        if rng.random() < 0.5:
            server.serve()
    backlog = [("a", size) for size in mine[head:]] + [("b", size) for size in others]
    rng.shuffle(backlog)
    for tenant, size in backlog:
        server.submit(request(next(numbers), tenant, size))
    most = max(*mine, *others) + OUTPUT_COST
    start = dict(server.served)
    left = {name: sum(item.tenant == name for _, item in server.line) for name in "ab"}
    while all(left.values()):
        left[server.serve().tenant] -= 1
        got = {name: server.served.get(name, 0) - start.get(name, 0) for name in "ab"}
        assert abs(got["a"] / weight - got["b"]) <= 2 * (most / weight + most), got


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.booleans()), max_size=60))
def test_one_tenant_is_served_as_it_came(story: list[tuple[int, int, bool]]) -> None:
    """Whatever was expected of its answers and came otherwise."""
    server = Server()
    for number, (tokens, limit, serves) in enumerate(story):
        server.submit(request(number, tokens=tokens, limit=limit))
        if serves:
            server.serve()
    while server.line:
        server.serve()
    assert [turn.id for turn in server.turns] == [f"r{number}" for number in range(len(story))]


def test_who_comes_into_a_flood_waits_for_one_request_not_for_all() -> None:
    server = Server()
    for number in range(500):
        server.submit(request(number, "flood", 50))
    for _ in range(100):
        server.serve()
    server.submit(request(500, "late", 50))
    assert "late" in (server.serve().tenant, server.serve().tenant)


def test_one_request_at_a_time_is_a_share_too() -> None:
    """Who always asks for the next thing when the last is done owes for it, although nothing of his waits."""
    server = Server(heavy=9.0)
    numbers = itertools.count()
    for _ in range(2000):
        server.submit(request(next(numbers), "heavy", 50))
    server.submit(request(next(numbers), "light", 50))
    for _ in range(1000):
        if server.serve().tenant == "light":
            server.submit(request(next(numbers), "light", 50))
    assert server.served["heavy"] / server.served["light"] == pytest.approx(9.0, rel=0.15)


def test_an_endless_row_of_new_names_does_not_keep_the_others_waiting() -> None:
    server = Server()
    numbers = itertools.count()
    for _ in range(5):
        server.submit(request(next(numbers), "old", 50))
    for turn in range(100):
        server.submit(request(next(numbers), f"new{turn}", 50))
        server.serve()
    assert sum(turn.tenant == "old" for turn in server.turns) == 5


def test_a_priority_overtakes_but_only_by_its_head_start() -> None:
    server = Server()
    numbers = itertools.count()
    low = request(next(numbers), "b", 50)
    for _ in range(20):
        server.submit(request(next(numbers), "a", 50))
    server.submit(low)
    server.submit(request(next(numbers), "c", 50, priority=1))
    assert server.serve().tenant == "c"
    while low.id not in {turn.id for turn in server.turns}:
        server.submit(request(next(numbers), "pushy", 1000, priority=100))
        server.serve()
    pushed = server.served["pushy"]
    assert pushed <= 100 * LEVEL_TOKENS + 2000


def test_priority_does_not_buy_a_larger_share() -> None:
    server = Server()
    numbers = itertools.count()
    for _ in range(600):
        server.submit(request(next(numbers), "pushy", 1000, priority=2))
        server.submit(request(next(numbers), "meek", 1000))
    for _ in range(800):
        server.serve()
    ahead = server.served["pushy"] - server.served["meek"]
    assert 0 < ahead <= 2 * LEVEL_TOKENS + 2 * 1002


def test_within_a_tenant_a_higher_priority_is_first_and_takes_nobody_along() -> None:
    server = Server()
    for number in range(40):
        server.submit(request(number, "a", 50))
    server.submit(request(40, "a", 50, priority=5))
    assert server.serve().id == "r40"
    server.submit(request(41, "b", 50))  # not behind the forty, although the one at their end was served
    assert "b" in (server.serve().tenant, server.serve().tenant, server.serve().tenant)


def test_a_low_priority_that_waits_gives_newcomers_no_credit() -> None:
    """It waits of its own free will, so how far the service has come is not measured by it."""
    server = Server()
    numbers = itertools.count()
    server.submit(request(next(numbers), "background", 50, priority=-100))
    for _ in range(300):
        server.submit(request(next(numbers), "a", 100))
    for _ in range(200):
        assert server.serve().tenant == "a"
    for _ in range(100):
        server.submit(request(next(numbers), "b", 100))
    for _ in range(20):
        server.serve()
    late = [turn.tenant for turn in server.turns[-20:]]
    assert 9 <= late.count("a") <= 11, late


def test_answers_are_expected_to_be_as_the_last_ones_and_settled_later() -> None:
    shares = FairShare()
    unknown = shares.enter(request(0, "a", 10, None)), shares.enter(request(1, "a", 10, None))
    assert unknown == (0.0, 10 + OUTPUT_COST * EXPECTED_OUTPUT)
    shares.enter(request(2, "b", 10, None))
    for name in ("r0", "r1"):
        shares.begin(name)
        shares.leave(name, 1000)
    [first, second] = [shares.enter(request(number, "a", 10, None)) for number in (3, 4)]
    assert first == pytest.approx(2 * (10 + OUTPUT_COST * 1000))
    assert second - first > 10 + OUTPUT_COST * EXPECTED_OUTPUT
    assert shares.enter(request(5, "a", 10, 7)) - second > 0


def test_what_was_never_served_is_not_paid_for() -> None:
    shares = FairShare()
    for number in range(10):
        shares.enter(request(number, "a", 100))
    shares.enter(request(10, "b"))
    for number in range(1, 10):
        shares.leave(f"r{number}", 0)
    shares.begin("r0")
    shares.leave("r0", 1)
    for number in range(11, 14):
        shares.enter(request(number, "b", 30))
    assert shares.enter(request(14, "a")) <= 10 * 102
    shares.leave("never heard of", 1)
    shares.begin("never heard of")


def test_later_outputs_stand_where_the_first_one_does_and_are_paid_for() -> None:
    shares = FairShare()
    ranks = [shares.enter(request(0, "a", 100)), shares.enter(request(1, "a", 100))]
    later = shares.enter(request(2, "a", 100, follows="r0"))
    assert later == ranks[0] and shares.enter(request(3, "a", 100)) == 3 * 102


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(-100, 100)), max_size=80))
def test_the_order_is_total_and_records_end_with_their_requests(story: list[tuple[int, int, int]]) -> None:
    server = Server(t1=2.0)
    for number, (tenant, serves, priority) in enumerate(story):
        server.submit(request(number, f"t{tenant}", 10, priority=priority))
        for _ in range(min(serves // 10, len(server.line))):
            server.serve()
        keys = [key for key, _ in server.line]
        assert len(set(keys)) == len(keys)
        waiting = [item.tenant for _, item in server.line]
        assert server.shares.waiting == len(waiting)
        assert all(server.shares.waiting_of(name) == waiting.count(name) for name in {*waiting, "t0"})
    while server.line:
        server.serve()
    assert server.shares.waiting == 0 and server.shares.num_tenants <= 6


def test_tenants_are_forgotten() -> None:
    shares = FairShare()
    shares.enter(request(0, "stays", 10))  # so that debts are not void
    for number in range(1, 5000):
        shares.enter(request(number, f"t{number}", 10))
        shares.begin(f"r{number}")
        shares.leave(f"r{number}", 1)
        assert shares.num_tenants <= MAX_IDLE + 1
    assert shares.waiting == 1


def test_front_ends_that_share_instances_count_the_same_time():
    old, new = FairShare(), FairShare()
    for number in range(50):
        rank = old.enter(request(number))
        old.begin(f"r{number}")
    assert new.enter(request(0)) < rank, "it has just begun to count"
    new.begin("r0")
    new.catch_up(rank)
    assert new.enter(request(1, tenant="b")) >= rank
    newest = old.enter(request(50, tenant="b"))
    old.catch_up(rank)  # its own: nothing new
    assert old.enter(request(51, tenant="c")) <= newest
