"""The members as a second front-end has them: what the primary says, and what it hears itself."""

import pytest

from jmemserve.config import Role
from jmemserve.errors import Unavailable
from jmemserve.scheduler.following import Following
from jmemserve.scheduler.membership import Change
from jmemserve.scheduler.messages import Member, MemberState, Ready, Roster

FACTS = (("--block-size", "16"),)


def roster(**members: MemberState) -> Roster:
    return Roster(1, tuple(Member(name, 7, Role.DECODE, state, f"at {name}") for name, state in members.items()))


def attend(following: Following, name: str, epoch: int = 7, now: float = 0.0) -> list[Change]:
    changes = following.admit(name, epoch, Role.DECODE, FACTS, now)
    return [*changes, *following.ready(name, Ready(f"at {name}", FACTS, 512), now)]


def both() -> Following:
    following = Following("there:1", silence_s=3.0)
    following.follow("life 1", roster(a=MemberState.READY, b=MemberState.READY), 0.0)
    assert list(following.wanted) == ["a", "b"]
    for name in "ab":
        assert attend(following, name)[-1] == Change(name, MemberState.READY), "no probe: the primary has done them"
    assert following.outbox == [], "instances hear of members from the primary only"
    return following


def states(following: Following) -> dict[str, MemberState]:
    return {record.name: record.state for record in following.records.values()}


def test_only_who_is_ready_is_wanted():
    following = Following("there:1")
    following.follow("life 1", roster(a=MemberState.JOINING), 0.0)
    assert following.wanted == {}
    following.follow("life 1", roster(a=MemberState.READY), 1.0)
    assert following.wanted["a"].address == "at a"


def test_who_drains_gets_nothing_and_who_is_given_up_is_gone():
    following = both()
    changes = following.follow("life 1", roster(a=MemberState.DRAINING, b=MemberState.READY), 1.0)
    assert changes == [Change("a", MemberState.DRAINING)]
    assert list(following.wanted) == ["b"]
    assert following.follow("life 1", roster(a=MemberState.DRAINING, b=MemberState.READY), 1.0) == []
    changes = following.follow("life 1", roster(), 2.0)
    assert [(change.name, change.state) for change in changes] == [("a", MemberState.DEAD), ("b", MemberState.DEAD)]
    assert following.wanted == {}
    assert following.records["b"].reason == "the front-end at there:1 has given it up"


def test_a_primary_that_starts_anew_takes_nobody_away():
    following = both()
    assert following.follow("life 2", roster(), 1.0) == []
    assert following.follow("life 2", roster(a=MemberState.JOINING), 2.0) == []
    assert states(following) == {"a": MemberState.READY, "b": MemberState.READY}
    following.follow("life 2", roster(a=MemberState.READY), 3.0)
    assert list(following.wanted) == ["a", "b"]
    changes = following.follow("life 2", roster(), 4.0)
    assert [change.name for change in changes] == ["a"], "it has named this one before"


def test_the_same_life_may_come_again_and_a_former_one_may_not():
    following = both()
    following.dead("a", "its stream ended", 1.0)
    assert attend(following, "a", now=2.0)[-1] == Change("a", MemberState.READY)
    assert [record.reason for record in following.gone] == ["its stream ended"]
    changes = attend(following, "a", epoch=8, now=3.0)
    assert [change.state for change in changes] == [MemberState.DEAD, MemberState.LOADING, MemberState.READY]
    with pytest.raises(Unavailable, match="former life"):
        following.admit("a", 7, Role.DECODE, FACTS, 4.0)


def test_silence_is_noticed_here_too():
    following = both()
    assert {change.name for change in following.expire(3.1)} == {"a", "b"}


def test_what_the_primary_decides_is_refused_with_its_address():
    following = both()
    for ask in (lambda: following.drain("a", 1.0), lambda: following.change_role("a", Role.PREFILL)):
        with pytest.raises(Unavailable, match="ask the one at there:1 to"):
            ask()
    assert states(following)["a"] is MemberState.READY
