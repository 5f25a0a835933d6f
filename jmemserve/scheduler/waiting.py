"""Blocks that cannot be placed in the prompt tree yet, since the block before them has no copy at this moment.

It happens when that one's only copy is on its way between media: it has no place in a snapshot, and what continues it
has. A few blocks for a short time, so each has an entry of its own.
"""

from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.events import Stored

MAX_WAITING = 4096  # blocks of one instance


class Waiting:
    """Of one instance: by the id of the block before, and by their own."""

    def __init__(self) -> None:
        self._below: dict[int, dict[int, dict[Medium, Stored]]] = {}
        self._parents: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, event: Stored, step: int) -> bool:
        """Hold back the blocks of a record. False: they are too many, or at another place already."""
        parent = event.parent
        if len(self) + len(event.ids) > MAX_WAITING:
            return False
        for place, one in enumerate(event.ids):
            if self._parents.setdefault(one, parent) != parent:
                return False
            tokens = event.tokens[place * step : (place + 1) * step]
            record = Stored(event.number, event.medium, event.space, parent, (one,), tokens)
            self._below.setdefault(parent, {}).setdefault(one, {})[event.medium] = record
            parent = one
        return True

    def remove(self, one: int, medium: Medium) -> bool:
        """A block lost its copy; False if it had none here."""
        parent = self._parents.get(one)
        if parent is None or self._below[parent][one].pop(medium, None) is None:
            return False
        if not self._below[parent][one]:
            self._leave(parent, one)
        return True

    def take(self, parent: int) -> list[Stored]:
        """That block has its place: what comes right after it waits no longer."""
        found: list[Stored] = []
        for one, media in list(self._below.get(parent, {}).items()):
            found += media.values()
            self._leave(parent, one)
        return found

    def _leave(self, parent: int, one: int) -> None:
        del self._below[parent][one], self._parents[one]
        if not self._below[parent]:
            del self._below[parent]

    def clear(self) -> None:
        self._below.clear()
        self._parents.clear()
