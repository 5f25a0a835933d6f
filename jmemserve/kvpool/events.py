"""What a pool tells others about its cache: which prefixes gained or lost a copy, in order and without gaps.

The index itself emits them, one stretch of blocks at a time. A cached block has an id, unlike all others of this life
of the pool, and its place is told by the id of the block before it; so a reader needs no hashes, and a prefix is
never confused with another. A reader that has missed something asks for ``since`` and, when that is too old, for a
snapshot (``BlockPool.snapshot``), which is the same kind of records.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from jmemserve.kvpool.address import Medium

START = 0  # the id before the first block of every prefix


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Blocks of consecutive tokens got a copy in this medium (another medium may have one already)."""

    number: int
    medium: Medium
    space: bytes  # model, adapter and cache salt: see ``index.key_space``
    parent: int  # id of the block before the first, or START
    ids: tuple[int, ...]
    tokens: bytes  # of all these blocks, as int32 in native order


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    """Blocks lost their copy in this medium (another medium may still have one)."""

    number: int
    medium: Medium
    ids: tuple[int, ...]


class EventLog:
    """The last ``capacity`` events. Numbers start at 1 and have no gaps."""

    def __init__(self, capacity: int = 65_536):
        self._events: deque[Stored | Removed] = deque(maxlen=capacity)
        self.last = 0  # number of the newest event

    def stored(self, medium: Medium, space: bytes, parent: int, ids: Sequence[int], tokens: bytes) -> None:
        """Tell that these blocks have a copy in this medium from now on."""
        self.last += 1
        self._events.append(Stored(self.last, medium, space, parent, tuple(ids), tokens))

    def removed(self, medium: Medium, ids: Sequence[int]) -> None:
        """Tell that these blocks have none in this medium any more."""
        self.last += 1
        self._events.append(Removed(self.last, medium, tuple(ids)))

    def since(self, number: int) -> list[Stored | Removed] | None:
        """Every event after that number, or None if some of them are forgotten: take a snapshot then."""
        lacking = self.last - number
        if lacking < 0 or lacking > len(self._events):
            return None
        return [self._events[place] for place in range(len(self._events) - lacking, len(self._events))]


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is cached at one moment; events with a number above ``number`` come on top of it."""

    number: int
    stored: tuple[Stored, ...]  # parents first; their own numbers mean nothing
