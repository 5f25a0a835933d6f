"""The members of a cluster as a second front-end has them: who they are, another front-end decides.

    primary ──roster──▶ follow ──▶ wanted ──dialled──▶ admit, ready ──▶ READY

It stays so until its stream ends or the roster says otherwise. A member that answers here is ready: the primary has
seen that it works with all others. A primary that has started anew knows nobody yet, so a member is given up on its
word only if this life of it has named the member before; the others are kept for as long as they answer. Pure: ``now``
is an argument.
"""

from collections.abc import Iterable

from jmemserve.config import Role
from jmemserve.errors import Unavailable
from jmemserve.scheduler.membership import MAX_GONE, SILENCE_S, Change, Membership, Record
from jmemserve.scheduler.messages import Member, MemberState, Roster


class Following(Membership):
    """Of a front-end that decides nothing about members. ``primary``: the address of the one that does."""

    def __init__(self, primary: str, silence_s: float = SILENCE_S):
        super().__init__(silence_s)
        self.primary = primary
        self.wanted: dict[str, Member] = {}  # to be attended, by name
        self._life = ""  # of the primary
        self._named: set[str] = set()  # by this life of it

    def follow(self, life: str, roster: Roster, now: float) -> list[Change]:
        """The primary, in this life of it, says who is there."""
        if life != self._life:
            self._life, self._named = life, set()
        members = {member.name: member for member in roster.members}
        changes: list[Change] = []
        for name in sorted(self._named - members.keys()):
            self.wanted.pop(name, None)
            if name in self.records:
                changes += self.dead(name, f"the front-end at {self.primary} has given it up", now)
        self._named = set(members)
        for name, member in members.items():
            record = self.records.get(name)
            if member.state is MemberState.READY:
                self.wanted[name] = member
            elif member.state is MemberState.DRAINING:
                self.wanted.pop(name, None)
                if record is not None and record.state is MemberState.READY:
                    changes.append(self._enter(record, MemberState.DRAINING, now))
        return changes

    def admit(
        self, name: str, epoch: int, role: Role, facts: Iterable[tuple[str, str]], now: float, place: str = ""
    ) -> list[Change]:
        """As by the primary, but the same life may come again: only the way to it was lost."""
        old = self.records.get(name)
        if old is not None and not old.alive and old.epoch == epoch:
            self.gone = [*self.gone, old][-MAX_GONE:]
            del self.records[name]
        return super().admit(name, epoch, role, facts, now, place)

    def drain(self, name: str, now: float) -> list[Change]:
        """Raises Unavailable."""
        raise self._not_here(f"drain {name}")

    def change_role(self, name: str, role: Role) -> None:
        """Raises Unavailable."""
        raise self._not_here(f"change the role of {name}")

    def _not_here(self, what: str) -> Unavailable:
        return Unavailable(f"this is a second front-end: ask the one at {self.primary} to {what}")

    def _introduce(self, record: Record, now: float) -> list[Change]:
        return [self._enter(record, MemberState.READY, now)]

    def _tell(self) -> None:
        pass  # the primary tells them
