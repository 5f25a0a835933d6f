"""Which stretch of the index was least recently used: a heap that is put right when something comes up."""

import heapq
from typing import Protocol


class Queued(Protocol):
    """What can wait in queues. ``queued`` has one bit per queue it is in; ``alive`` ends when it leaves the index."""

    last_use: int
    queued: int
    alive: bool


class EvictionQueue[T: Queued]:
    """Oldest use first. Invariant: something with this queue's bit set has exactly one entry here."""

    __slots__ = ("_bit", "_heap", "_limit", "_pushes")

    def __init__(self, bit: int):
        self._bit = bit
        self._heap: list[tuple[int, int, T]] = []  # (last use when it was pushed, push number, item)
        self._pushes = 0
        self._limit = 64

    def offer(self, item: T) -> None:
        """Queue it, unless it is queued already."""
        if item.queued & self._bit:
            return
        if len(self._heap) > self._limit:  # let go of entries of the dead
            self._heap = [entry for entry in self._heap if entry[2].alive]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + 64
        self._pushes += 1
        item.queued |= self._bit
        heapq.heappush(self._heap, (item.last_use, self._pushes, item))

    def pop(self) -> T | None:
        """Take out what was used least recently; the caller offers it again if it can still give something."""
        while self._heap:
            last_use, _, item = heapq.heappop(self._heap)
            item.queued &= ~self._bit
            if not item.alive:
                continue
            if item.last_use == last_use:
                return item
            self.offer(item)  # it was used since
        return None

    def __contains__(self, item: T) -> bool:
        return bool(item.queued & self._bit)
