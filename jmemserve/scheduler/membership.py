"""Who belongs to the cluster, and in which life.

    admit ──▶ LOADING ──ready──▶ JOINING ──every probe went well──▶ READY ──drain──▶ DRAINING ──left──▶ LEFT
                 └──────────────────┴── silent, lost or refused ──────┴───────────────┴──▶ DEAD

An instance is admitted under a name with an epoch; a higher epoch under the same name is its next life and ends the one
before. While it joins, it and every other member move blocks to each other once: what cannot work is refused here, with
the reason, and not at the first request. Pure: ``now`` is an argument (monotonic seconds).
"""

import dataclasses
from collections.abc import Collection, Iterable

from jmemserve.config import Role
from jmemserve.errors import NameTaken, Unavailable
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.messages import Beat, ChangeRole, Member, MemberState, Probe, Probed, Ready, Roster
from jmemserve.types import InstanceLoad, MemberReport

SILENCE_S = 10.0  # without a Beat an instance is dead
STALL_S = 300.0  # an instance whose thread is stuck for so long is dead although it beats
JOIN_S = 90.0  # for linking and probing
MAX_MEMBERS = 1024
MAX_GONE = 64  # members remembered after their end, for people
_ALIVE = (MemberState.LOADING, MemberState.JOINING, MemberState.READY, MemberState.DRAINING)
_LINKED = (MemberState.JOINING, MemberState.READY, MemberState.DRAINING)


@dataclasses.dataclass(slots=True)
class Record:
    """All that is known of one instance. A Beat renews ``heard``."""

    name: str
    epoch: int
    role: Role
    facts: dict[str, str]
    heard: float
    since: float  # of the present state
    place: str = ""  # the process or machine, for people
    state: MemberState = MemberState.LOADING
    address: str = ""
    max_model_len: int = 0
    profile: Profile | None = None  # what work costs there, if it was measured
    reason: str = ""  # why it is dead
    load: InstanceLoad | None = None
    probes: set[tuple[str, str]] = dataclasses.field(default_factory=set)  # (source, target) still to come
    ways: dict[str, str] = dataclasses.field(default_factory=dict)  # how peers get blocks of it

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE

    def member(self) -> Member:
        """As the others see it."""
        return Member(self.name, self.epoch, self.role, self.state, self.address)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """An instance got into another state."""

    name: str
    state: MemberState
    reason: str = ""


class Membership:
    """The instances of one cluster by name. Methods return what changed; ``outbox`` has messages to send."""

    def __init__(self, silence_s: float = SILENCE_S, stall_s: float = STALL_S):
        self._silence_s, self._stall_s = silence_s, stall_s
        self.records: dict[str, Record] = {}
        self.gone: list[Record] = []  # former lives, oldest first
        self.outbox: list[tuple[str, Probe | Roster | ChangeRole]] = []
        self.watchers: Collection[str] = ()  # other front-ends, which get the roster too
        self.version = 0
        self._asked: tuple[str, str] | None = None  # the probe under way
        self.serving = False  # nothing is cached anywhere before: probes may take what room they want

    def get(self, name: str) -> Record | None:
        """The newest life of this name, alive or not."""
        return self.records.get(name)

    def alive(self) -> list[Record]:
        """All that have neither left nor died, in the order of their joining."""
        return [record for record in self.records.values() if record.alive]

    def roster(self) -> Roster:
        """What the instances are told."""
        members = (record.member() for record in self.records.values() if record.state in _LINKED)
        return Roster(self.version, tuple(members))

    def learnt(self, name: str, profile: Profile) -> None:
        """What work costs at an instance by now. Of one that is unknown nothing is kept."""
        record = self.records.get(name)
        if record is not None:
            record.profile = profile

    def report(self, now: float) -> tuple[MemberReport, ...]:
        """For people: those that are gone first."""
        records = [*self.gone, *self.records.values()]
        return tuple(
            MemberReport(
                record.name,
                record.role.value,
                record.state.value,
                record.epoch,
                record.place,
                record.address,
                since_s=now - record.since,
                heard_s=max(0.0, now - record.heard),
                reason=record.reason,
                load=record.load,
                peers=tuple(sorted(record.ways.items())),
                profile="" if record.profile is None else record.profile.to_json(),
            )
            for record in sorted(records, key=lambda record: record.alive)
        )

    def free_name(self, role: Role) -> str:
        """The first unused name of this kind: prefill0, prefill1 ..."""
        number = 0
        while (taken := self.records.get(f"{role.value}{number}")) is not None and taken.alive:
            number += 1
        return f"{role.value}{number}"

    def admit(
        self, name: str, epoch: int, role: Role, facts: Iterable[tuple[str, str]], now: float, place: str = ""
    ) -> list[Change]:
        """Take an instance in; it loads from now on.

        ``place``: its process; another one cannot take the name of one that lives. Raises Unavailable, with what to
        change, if it cannot come; NameTaken if another try may help.
        """
        old = self.records.get(name)
        if old is not None and old.alive and old.place != place:
            raise NameTaken(f"{name} is a member already, at {old.place}: give another --name, or wait for its end")
        if old is not None and old.epoch >= epoch:
            raise Unavailable(f"{name} is known in epoch {old.epoch}; {epoch} is a former life of it: start it anew")
        if len(self.alive()) >= MAX_MEMBERS:
            raise Unavailable(f"the cluster has {MAX_MEMBERS} instances already")
        own = dict(facts)
        self._compare(name, own)
        changes = self.dead(name, "it has started anew", now) if old is not None and old.alive else []
        over = [record for record in self.records.values() if not record.alive and record is not old]
        over = sorted(over, key=lambda record: record.since)[: max(0, len(over) - MAX_GONE)]
        for former in [*over, *([old] if old is not None else [])]:
            self.gone = [*self.gone, former][-MAX_GONE:]
            del self.records[former.name]
        self.records[name] = Record(name, epoch, role, own, now, now, place)
        return [*changes, Change(name, MemberState.LOADING)]

    def ready(self, name: str, message: Ready, now: float) -> list[Change]:
        """The instance is loaded: it is introduced to all others. Raises Unavailable if it does not fit to them."""
        record = self.records[name]
        self._compare(name, dict(message.facts))
        if message.profile is not None:
            message.profile.check()
        record.facts |= dict(message.facts)
        record.address, record.max_model_len = message.address, message.max_model_len
        record.profile = message.profile
        return self._introduce(record, now)

    def _introduce(self, record: Record, now: float) -> list[Change]:
        """Blocks move between a newcomer and all others before it is ready."""
        name = record.name
        others = [other.name for other in self.records.values() if other.state in _LINKED]
        record.probes = {pair for other in others for pair in ((name, other), (other, name))}
        return [self._enter(record, MemberState.JOINING, now), *self._settle(record, now)]

    def probed(self, name: str, message: Probed, now: float) -> list[Change]:
        """A probe is over. One that failed ends the joining of the newcomer, not the life of a member."""
        changes: list[Change] = []
        source = self.records[name]
        for record in list(self.records.values()):
            pair = (name, message.peer)
            if record.state is not MemberState.JOINING or pair not in record.probes:
                continue
            if message.error:
                other = name if message.peer == record.name else message.peer
                changes += self.dead(record.name, f"no blocks between it and {other}: {message.error}", now)
                continue
            source.ways[message.peer] = message.way
            record.probes.discard(pair)
            changes += self._settle(record, now)
        return changes

    def beat(self, name: str, message: Beat, now: float) -> list[Change]:
        """A sign of life, and perhaps another role."""
        record = self.records[name]
        record.load, role = message.load, Role(message.load.role)
        if message.stalled_s < self._stall_s:
            record.heard = now
        if record.role is role:
            return []
        record.role = role
        self._tell()
        return [Change(name, record.state)]

    def change_role(self, name: str, role: Role) -> None:
        """The instance shall prefer something else; its Beats say when it does."""
        self.outbox.append((name, ChangeRole(role)))

    def drain(self, name: str, now: float) -> list[Change]:
        """The instance shall get nothing new; one that is not ready yet leaves at once."""
        record = self.records[name]
        if record.state is MemberState.READY:
            return [self._enter(record, MemberState.DRAINING, now)]
        return self.left(name, now) if record.state in (MemberState.LOADING, MemberState.JOINING) else []

    def left(self, name: str, now: float) -> list[Change]:
        """The instance is empty and goes."""
        record = self.records[name]
        return [self._enter(record, MemberState.LEFT, now), *self._unprobe(name, now)] if record.alive else []

    def dead(self, name: str, reason: str, now: float) -> list[Change]:
        """The instance is lost. One that has left or is dead is nothing to do."""
        record = self.records[name]
        if not record.alive:
            return []
        record.reason = reason
        return [self._enter(record, MemberState.DEAD, now), *self._unprobe(name, now)]

    def expire(self, now: float) -> list[Change]:
        """End what is silent, and what does not get on with joining."""
        changes: list[Change] = []
        for record in self.alive():
            # Loading takes what it takes, and nobody depends on it yet.
            limit = self._stall_s if record.state is MemberState.LOADING else self._silence_s
            if now - record.heard > limit:
                changes += self.dead(record.name, f"nothing was heard of it for {limit:g} s", now)
            elif record.state is MemberState.JOINING and now - record.since > JOIN_S:
                missing = ", ".join(sorted({f"{a} to {b}" for a, b in record.probes}))
                changes += self.dead(record.name, f"no blocks came over within {JOIN_S:g} s: {missing}", now)
        return changes

    # -- inside -------------------------------------------------------------------------------------------------------

    def _compare(self, name: str, facts: dict[str, str]) -> None:
        """Raise Unavailable if one of the facts is another than that of a member."""
        for other in self.alive():
            if other.name == name:
                continue
            for fact, value in facts.items():
                if fact in other.facts and other.facts[fact] != value:
                    raise Unavailable(
                        f"{name} cannot join: its {fact} is {value}, that of {other.name} is {other.facts[fact]}; "
                        "start it with the same model and flags"
                    )

    def _settle(self, record: Record, now: float) -> list[Change]:
        changes = [] if record.probes else [self._enter(record, MemberState.READY, now)]
        self._probe_next()
        return changes

    def _probe_next(self) -> None:
        """One probe after the other: two at once might not find room where all is small."""
        pairs = [pair for r in self.records.values() if r.state is MemberState.JOINING for pair in sorted(r.probes)]
        if self._asked in pairs:
            return
        self._asked = pairs[0] if pairs else None  # forgotten when it is over: another life may be asked the same
        if pairs:
            self.outbox.append((pairs[0][0], Probe(pairs[0][1], not self.serving)))

    def _unprobe(self, name: str, now: float) -> list[Change]:
        """Who joins does not wait for one that is gone."""
        changes = []
        for record in self.records.values():
            if record.state is MemberState.JOINING:
                record.probes = {pair for pair in record.probes if name not in pair}
                changes += self._settle(record, now)
        self._probe_next()
        return changes

    def _enter(self, record: Record, state: MemberState, now: float) -> Change:
        record.state, record.since = state, now
        self._tell()
        return Change(record.name, state, record.reason)

    def _tell(self) -> None:
        """Everybody who has links gets the new roster."""
        self.version += 1
        roster = self.roster()
        linked = (record.name for record in self.records.values() if record.state in _LINKED)
        self.outbox += [(name, roster) for name in (*linked, *self.watchers)]
