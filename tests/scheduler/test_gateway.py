"""Requests in flight: news in order and once, attempts that follow each other, requests that wait."""

import pytest

from jmemserve.config import Role
from jmemserve.errors import DuplicateRequest, Overloaded, Unavailable
from jmemserve.scheduler.admission import Limits
from jmemserve.scheduler.gateway import MAX_ATTEMPTS, PARKED_S, Gateway
from jmemserve.scheduler.messages import Abort, Move, Submit
from jmemserve.scheduler.router import Router
from jmemserve.types import Event, FinishReason, Request, SamplingParams, Usage


def make(*instances: tuple[str, Role], max_queue: int = 10) -> Gateway:
    gateway = Gateway(Router((), 4), Limits(max_queue))
    for name, role in instances:
        gateway.add(name, role, 0.0)
    return gateway


PD = (("prefill0", Role.PREFILL), ("decode0", Role.DECODE), ("decode1", Role.DECODE))


def request(name: str, deadline: float | None = None) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=8), 0, deadline=deadline)


def submit(gateway: Gateway, name: str) -> str:
    """The id of the first attempt."""
    gateway.submit(request(name), 0.0)
    return sent(gateway)[0][1].request.id


def sent(gateway: Gateway) -> list:
    out, gateway.outbox[:] = list(gateway.outbox), []
    return out


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def end(attempt: str, made: tuple[int, ...], start: int) -> Event:
    return Event(attempt, made, finish=FinishReason.LENGTH, usage=Usage(3, start + len(made)), start=start)


def test_news_that_overtake_wait_and_doubled_ones_are_cut():
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    assert gateway.news("decode0", [Event(attempt, (20,), start=1), Event(attempt, (30,), start=2)], 1.0) == []
    first = gateway.news("prefill0", [Event(attempt, (10,), start=0)], 1.0)
    assert tokens(first) == [10, 20, 30] and {event.request_id for event in first} == {"a"}
    again = gateway.news("prefill0", [Event(attempt, (10, 20), start=0)], 1.0)
    assert again == [] and gateway.counts.doubled == 2
    last = gateway.news("decode0", [end(attempt, (30, 40), 2)], 1.0)
    assert tokens(last) == [40] and last[-1].finish is FinishReason.LENGTH and len(gateway) == 0
    gateway.router.check()


def test_a_lost_instance_is_followed_by_another_attempt_and_the_zombie_is_not_heard():
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    gateway.news("prefill0", [Event(attempt, (10,), start=0)], 1.0)
    gateway.news("decode0", [Event(attempt, (20,), start=1)], 1.0)
    gateway.lost("decode0", 2.0)
    [(home, message)] = sent(gateway)
    assert home == "prefill0" and message.generated == (10, 20) and message.first_token == 1.0
    assert message.request.id != attempt and message.decode == "decode1"
    assert gateway.news("decode0", [Event(attempt, (99,), start=2)], 2.5) == []
    assert gateway.counts.late == 1 and gateway.counts.retries == 1
    assert tokens(gateway.news("decode1", [Event(message.request.id, (30,), start=2)], 3.0)) == [30]


def test_the_loss_of_who_handed_a_request_over_does_not_matter():
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    gateway.news("prefill0", [Event(attempt, (10,), start=0)], 1.0)
    gateway.news("decode0", [Event(attempt, (20,), start=1)], 1.0)
    gateway.lost("prefill0", 2.0)
    assert sent(gateway) == [] and gateway.counts.retries == 0


def test_without_an_instance_requests_wait_and_then_fail():
    gateway = make(("colocated0", Role.COLOCATED))
    submit(gateway, "a")
    gateway.lost("colocated0", 1.0)
    with pytest.raises(Unavailable):
        gateway.submit(request("b"), 1.0)
    gateway.submit(request("c"), 1.0, patient=True)
    gateway.submit(request("d", deadline=5.0), 1.0, patient=True)
    assert sent(gateway) == []
    [late] = gateway.tick(6.0)
    assert (late.request_id, late.finish) == ("d", FinishReason.DEADLINE)
    assert [event.finish for event in gateway.abort("c", FinishReason.ABORT, 7.0)] == [FinishReason.ABORT]
    [failed] = gateway.tick(PARKED_S + 2)
    assert failed.finish is FinishReason.ERROR and "no instance was ready" in failed.error
    gateway.submit(request("e"), 200.0, patient=True)
    gateway.add("colocated1", Role.COLOCATED, 201.0)
    assert [(home, type(message)) for home, message in sent(gateway)] == [("colocated1", Submit)]


def test_a_request_that_every_instance_dies_of_is_given_up():
    gateway = make(("colocated0", Role.COLOCATED))
    submit(gateway, "poison")
    events: list[Event] = []
    for life in range(1, MAX_ATTEMPTS + 1):
        assert not events
        events = gateway.lost(f"colocated{life - 1}", float(life))
        if not events:
            gateway.add(f"colocated{life}", Role.COLOCATED, float(life))
    [failed] = events
    assert failed.finish is FinishReason.ERROR and "in a row" in failed.error and gateway.counts.failed == 1


def test_an_abort_of_what_is_lost_ends_it():
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    assert gateway.abort("a", FinishReason.ABORT, 1.0) == []
    assert sent(gateway) == [
        ("prefill0", Abort(attempt, FinishReason.ABORT)),
        ("decode0", Abort(attempt, FinishReason.ABORT)),
    ]
    [event] = gateway.lost("prefill0", 2.0)
    assert event.finish is FinishReason.ABORT and gateway.abort("a", FinishReason.ABORT, 3.0) is None


def test_a_drain_moves_what_is_there():
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    gateway.news("prefill0", [Event(attempt, (10,), start=0)], 1.0)
    gateway.news("decode0", [Event(attempt, (20,), start=1)], 1.0)
    gateway.drain("decode0", 2.0)
    assert sent(gateway) == [("decode0", Move(attempt, "decode1"))]
    gateway.tick(2.5)
    assert sent(gateway) == []
    gateway.tick(10.0)  # it has not moved, as far as is known here: wherever it is, it is asked again
    assert ("decode0", Move(attempt, "decode1")) in sent(gateway)
    gateway.news("decode1", [Event(attempt, (30,), start=2)], 11.0)
    assert gateway.at("decode0") == []


def test_limits_and_ids():
    gateway = make(*PD, max_queue=1)
    submit(gateway, "a")
    with pytest.raises(DuplicateRequest):
        gateway.submit(request("a"), 0.0)
    with pytest.raises(Overloaded):
        gateway.submit(request("b"), 0.0)
    gateway.submit(request("b"), 0.0, accepted=True)


def test_the_router_hears_of_the_first_token_of_every_attempt():
    """Tokens that go on are passed on without further ado; those of a new attempt are looked at."""
    gateway = make(*PD)
    attempt = submit(gateway, "a")
    gateway.news("prefill0", [Event(attempt, (10,))], 1.0)
    for place in (1, 2, 3):
        assert tokens(gateway.news("decode0", [Event(attempt, (place,), start=place)], 1.0)) == [place]
    gateway.lost("decode0", 2.0)
    [(home, message)] = sent(gateway)
    assert not gateway.router._flights[message.request.id].started
    assert tokens(gateway.news(home, [Event(message.request.id, (4,), start=4)], 3.0)) == [4]
    assert gateway.router._flights[message.request.id].started
    gateway.router.check()
