"""Who is a member: names, epochs, facts, probes, silence."""

import pytest

from jmemserve.config import Role
from jmemserve.errors import NameTaken, Unavailable
from jmemserve.scheduler.membership import JOIN_S, MAX_GONE, Membership
from jmemserve.scheduler.messages import Beat, MemberState, Probe, Probed, Ready, Roster
from jmemserve.types import InstanceLoad

FACTS = (("--block-size", "16"),)


def load(name: str, role: str = "decode") -> InstanceLoad:
    return InstanceLoad(name, role, *([0] * 12))


def join(members: Membership, name: str, epoch: int, now: float = 0.0, role: Role = Role.DECODE) -> None:
    """Admit, get ready, and answer every probe."""
    members.admit(name, epoch, role, FACTS, now)
    members.ready(name, Ready(f"address of {name}", FACTS, 512), now)
    answer_probes(members, now)


def answer_probes(members: Membership, now: float) -> list[tuple[str, str]]:
    """As if each worked; which there were."""
    seen = []
    while any(isinstance(message, Probe) for _, message in members.outbox):
        asked = [(name, message) for name, message in members.outbox if isinstance(message, Probe)]
        members.outbox.clear()
        for name, message in asked:
            seen.append((name, message.peer))
            members.probed(name, Probed(message.peer, "", "tcp"), now)
    return seen


def states(members: Membership) -> dict[str, MemberState]:
    return {record.name: record.state for record in members.records.values()}


def test_a_newcomer_is_probed_in_both_directions_one_after_the_other():
    members = Membership()
    join(members, "a", 1)
    assert states(members) == {"a": MemberState.READY}, "nobody to exchange blocks with"
    members.admit("b", 2, Role.DECODE, FACTS, 0.0)
    members.outbox.clear()
    members.ready("b", Ready("there", FACTS, 256), 0.0)
    assert [name for name, message in members.outbox if isinstance(message, Roster)] == ["a", "b"]
    assert sum(isinstance(message, Probe) for _, message in members.outbox) == 1
    assert states(members)["b"] is MemberState.JOINING
    assert answer_probes(members, 0.0) == [("a", "b"), ("b", "a")]
    assert states(members)["b"] is MemberState.READY
    assert members.records["a"].ways == {"b": "tcp"}


def test_a_probe_that_fails_ends_the_newcomer_and_nobody_else():
    members = Membership()
    join(members, "a", 1)
    members.admit("b", 2, Role.DECODE, FACTS, 0.0)
    members.ready("b", Ready("there", FACTS, 256), 0.0)
    members.probed("a", Probed("b", "the checksums differ"), 0.0)
    assert states(members) == {"a": MemberState.READY, "b": MemberState.DEAD}
    assert "the checksums differ" in members.records["b"].reason


def test_facts_must_be_equal():
    members = Membership()
    join(members, "a", 1)
    with pytest.raises(Unavailable, match="b cannot join: its --block-size is 32, that of a is 16"):
        members.admit("b", 2, Role.DECODE, (("--block-size", "32"),), 0.0)
    assert "b" not in members.records
    members.admit("c", 3, Role.DECODE, (), 0.0)
    with pytest.raises(Unavailable, match="block-size is 8"):
        members.ready("c", Ready("there", (("--block-size", "8"),), 256), 0.0)


def test_a_higher_epoch_is_the_next_life_and_a_lower_one_is_refused():
    members = Membership()
    join(members, "a", 5)
    with pytest.raises(Unavailable, match="a is known in epoch 5; 5 is a former life"):
        members.admit("a", 5, Role.DECODE, FACTS, 1.0)
    changes = members.admit("a", 6, Role.DECODE, FACTS, 1.0)
    assert [(change.name, change.state) for change in changes] == [
        ("a", MemberState.DEAD),
        ("a", MemberState.LOADING),
    ]
    assert [record.epoch for record in members.gone] == [5]


def test_silence_ends_a_member_but_not_one_that_loads():
    members = Membership(silence_s=3.0)
    join(members, "a", 1)
    members.admit("slow", 2, Role.DECODE, FACTS, 0.0)
    members.beat("a", Beat(load("a")), 2.0)
    assert members.expire(4.9) == []
    assert [change.name for change in members.expire(5.1)] == ["a"]
    assert members.records["slow"].alive
    assert [change.name for change in members.expire(1000.0)] == ["slow"]


def test_a_thread_that_is_stuck_is_no_sign_of_life():
    members = Membership(silence_s=3.0, stall_s=60.0)
    join(members, "a", 1)
    members.beat("a", Beat(load("a"), stalled_s=10.0), 2.0)
    members.beat("a", Beat(load("a"), stalled_s=70.0), 4.0)
    assert [change.name for change in members.expire(5.5)] == ["a"]


def test_who_cannot_be_probed_does_not_join_for_ever_and_the_dead_keep_nobody_waiting():
    members = Membership(silence_s=1e9)
    join(members, "a", 1)
    members.admit("b", 2, Role.DECODE, FACTS, 0.0)
    members.ready("b", Ready("there", FACTS, 256), 0.0)
    assert [change.name for change in members.expire(JOIN_S + 1)] == ["b"]
    members.admit("c", 3, Role.DECODE, FACTS, 200.0)
    members.ready("c", Ready("there", FACTS, 256), 200.0)
    changes = members.dead("a", "killed", 201.0)
    assert ("c", MemberState.READY) in [(change.name, change.state) for change in changes]


def test_a_beat_may_bring_another_role():
    members = Membership()
    join(members, "a", 1)
    [change] = members.beat("a", Beat(load("a", "prefill")), 1.0)
    assert (change.name, change.state, members.records["a"].role) == ("a", MemberState.READY, Role.PREFILL)
    assert members.beat("a", Beat(load("a", "prefill")), 2.0) == []


def test_names_are_given_and_free_again():
    members = Membership()
    assert members.free_name(Role.PREFILL) == "prefill0"
    join(members, "prefill0", 1, role=Role.PREFILL)
    assert members.free_name(Role.PREFILL) == "prefill1"
    members.dead("prefill0", "killed", 0.0)
    assert members.free_name(Role.PREFILL) == "prefill0"


def test_nobody_takes_the_name_of_another_process_that_lives():
    members = Membership()
    members.admit("a", 1, Role.DECODE, FACTS, 0.0, "host:1")
    with pytest.raises(NameTaken, match="a is a member already, at host:1: give another --name"):
        members.admit("a", 2, Role.DECODE, FACTS, 1.0, "host:2")
    members.dead("a", "its stream ended", 2.0)
    members.admit("a", 3, Role.DECODE, FACTS, 3.0, "host:2")
    members.admit("a", 4, Role.DECODE, FACTS, 4.0, "host:2")  # the same process, anew


def test_what_is_over_is_not_remembered_for_ever():
    members = Membership()
    for number in range(3 * MAX_GONE):
        members.admit(f"i{number}", number + 1, Role.DECODE, FACTS, float(number))
        members.dead(f"i{number}", "killed", float(number))
    assert len(members.records) <= MAX_GONE + 1 and len(members.gone) == MAX_GONE
