"""Who is refused at once: a full queue, a tenant that fills it, a first token that would come too late."""

import dataclasses
from typing import Any

import pytest

from jmemserve.config import EngineConfig, Role, Warmup
from jmemserve.errors import ConfigError, Overloaded
from jmemserve.scheduler.admission import LATEST_RETRY_S, SOONEST_RETRY_S, Limits, in_line
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.fairness import LEVEL_TOKENS
from jmemserve.scheduler.gateway import Gateway
from jmemserve.scheduler.messages import Submit
from jmemserve.scheduler.policies import POLICIES
from jmemserve.scheduler.router import Router
from jmemserve.types import Event, FinishReason, Request, SamplingParams


class PredictingRouter(Router):
    """Says when a first token comes: a second per 100 tokens that the instance has to compute before, and for it."""

    def route(self, request_id: str, *arguments: Any, **more: Any) -> Any:
        route = super().route(request_id, *arguments, **more)
        predicted = self.load(route.prefill).pending / 100
        return dataclasses.replace(route, predicted_ttft_s=predicted)


def make(**limits: Any) -> Gateway:
    gateway = Gateway(PredictingRouter((), 4), Limits(**{"max_queue": 100, **limits}))
    gateway.add("colocated0", Role.COLOCATED, 0.0)
    return gateway


def ask(gateway: Gateway, name: str, tokens: int = 100, accepted: bool = False, **more: Any) -> Request:
    """The request as the instance gets it."""
    prompt = tuple(hash((name, place)) % 1000 for place in range(tokens))
    request = Request(name, prompt, SamplingParams(max_tokens=8), 0, **more)
    gateway.submit(request, 0.0, accepted=accepted)
    [(_, message)], gateway.outbox[:] = list(gateway.outbox), []
    assert isinstance(message, Submit)
    return message.request


def refused(gateway: Gateway, name: str, tokens: int = 100, **more: Any) -> Overloaded:
    """The refusal, after which nothing is changed."""
    before = len(gateway), gateway.router.load("colocated0"), list(gateway.outbox)
    with pytest.raises(Overloaded) as caught:
        ask(gateway, name, tokens, **more)
    assert before == (len(gateway), gateway.router.load("colocated0"), list(gateway.outbox))
    assert SOONEST_RETRY_S <= caught.value.retry_after_s <= LATEST_RETRY_S
    return caught.value


def test_what_would_wait_too_long_is_refused_with_a_hint() -> None:
    gateway = make(max_queue_delay_s=2.5)
    for name in "ab":
        ask(gateway, name)
    error = refused(gateway, "c")
    assert error.retry_after_s == pytest.approx(0.5)
    assert "the first token would take some 3 s, and 2.5 s is the limit (--max-queue-delay)" in str(error)
    assert refused(gateway, "d", 1_000_000).retry_after_s == LATEST_RETRY_S
    ask(gateway, "e", 50)
    ask(gateway, "f", accepted=True, follows="a")  # a later output of what was accepted


def test_without_a_limit_nothing_is_refused() -> None:
    gateway = make()
    for number in range(20):
        ask(gateway, str(number), deadline=0.001)


def test_a_deadline_that_cannot_be_met_is_a_limit_too() -> None:
    gateway = make(max_queue_delay_s=60.0)
    ask(gateway, "a", 300)
    assert "(the request's deadline)" in str(refused(gateway, "b", deadline=2.0))
    ask(gateway, "c", deadline=30.0)
    assert refused(gateway, "late", deadline=-5.0).retry_after_s > 5


def test_what_waits_behind_it_does_not_count() -> None:
    """A flood of one tenant, or of low priority, gets itself refused and nobody else."""
    gateway = make(max_queue_delay_s=6.5)
    for number in range(6):
        ask(gateway, f"flood{number}", tenant="flood")
    refused(gateway, "more", tenant="flood")
    late = ask(gateway, "late", tenant="late")
    assert late.rank < LEVEL_TOKENS
    ask(gateway, "urgent", tenant="flood", priority=1)
    assert in_line(10.0, 100, 0, 900) == 1.0 and in_line(10.0, 0, 0, 0) == 10.0


def test_one_tenant_may_not_fill_the_queue() -> None:
    gateway = make(max_queue=4, max_queue_per_tenant=2)
    first = ask(gateway, "a", salt="one")
    ask(gateway, "b", tenant="one")  # a salt stands for the tenant that is not named
    assert "2 requests of this tenant wait already (--max-queue-per-tenant)" in str(refused(gateway, "c", salt="one"))
    ask(gateway, "d", tenant="two")
    ask(gateway, "e", tenant="three")
    assert "4 requests wait already (--max-queue)" in str(refused(gateway, "f", tenant="four"))
    gateway.news("colocated0", [Event(first.id, (1,), start=0)], 1.0)
    ask(gateway, "g", tenant="one")
    ask(gateway, "h", tenant="one", accepted=True)
    assert [event.finish for event in gateway.fail_all("over", 2.0)] == [FinishReason.ERROR] * 6
    ask(gateway, "i", tenant="one")


def test_a_retry_keeps_its_rank_and_is_not_refused() -> None:
    gateway = make(max_queue_delay_s=3.5, max_queue=3, max_queue_per_tenant=3)
    ranks = [ask(gateway, name, priority=1).rank for name in "abc"]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    gateway.add("colocated1", Role.COLOCATED, 1.0)
    gateway.news("colocated0", [Event("r1.1", (5,), start=0)], 1.0)
    gateway.lost("colocated0", 2.0)
    again = [message.request for home, message in gateway.outbox if home == "colocated1"]
    assert [request.rank for request in again] == ranks and {request.priority for request in again} == {1}
    gateway.outbox.clear()
    gateway.lost("colocated1", 3.0)
    gateway.add("colocated2", Role.COLOCATED, 4.0)  # they were parked
    assert [message.request.rank for _, message in gateway.outbox] == ranks


def test_service_that_began_moves_newcomers_on() -> None:
    gateway = make()
    ask(gateway, "a", tenant="one")
    ask(gateway, "b", tenant="one")
    assert ask(gateway, "c", tenant="two").rank == 0
    gateway.news("colocated0", [Event("r1.1", (5,), start=0), Event("r3.1", (5,), start=0)], 1.0)
    assert ask(gateway, "d", tenant="three").rank > 0


def test_weights_of_the_configuration() -> None:
    limits = Limits.of(EngineConfig(tenant_weights="a=2, b=0.5", max_queue_delay_s=3, max_queue_per_tenant=9))
    assert limits == Limits(1024, 9, 3, (("a", 2.0), ("b", 0.5)))
    gateway = Gateway(PredictingRouter((), 4), dataclasses.replace(limits, max_queue_delay_s=None))
    gateway.add("colocated0", Role.COLOCATED, 0.0)
    ranks = {name: [ask(gateway, f"{name}{i}", tenant=name).rank for i in range(2)][1] for name in ("a", "b", "other")}
    assert ranks["a"] * 2 == ranks["other"] == ranks["b"] / 2


@pytest.mark.parametrize("text", ["a", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=1e9", "a=1,,b=2", "a=1,a=2"])
def test_weights_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="--tenant-weights"):
        EngineConfig(tenant_weights=text)


def test_too_many_weights() -> None:
    with pytest.raises(ConfigError, match="names 1025 tenants; 1024 are possible"):
        EngineConfig(tenant_weights=",".join(f"t{number}=1" for number in range(1025)))


def test_a_limit_on_the_delay_needs_costs() -> None:
    for without in ({"calibrate_s": 0.0}, {"warmup": Warmup.NONE}):
        with pytest.raises(ConfigError, match="costs must be measured"):
            EngineConfig(max_queue_delay_s=1.0, **without)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_limit_holds_with_every_policy_and_for_who_tries_again(policy: str) -> None:
    """What was refused left no promise behind that would make the next try look cheap."""
    router = Router([("colocated0", Role.COLOCATED)], 16, policy)
    router.set_profile("colocated0", Profile(steps=((1, 1, 0.01), (64, 8, 0.1))))
    gateway = Gateway(router, Limits(max_queue=100, max_queue_delay_s=1.0))
    for number in range(6):
        prompt = tuple(range(2048))
        with pytest.raises(Overloaded, match="would take some 3.2 s"):
            gateway.submit(Request(f"r{number}", prompt, SamplingParams(max_tokens=4), 0), 0.0)
    assert len(gateway) == len(router) == 0
    router.check()
