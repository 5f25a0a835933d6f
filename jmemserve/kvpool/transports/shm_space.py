"""Which parts of a run of bytes are in use: first fit from the lowest, so that the pages and caches stay warm."""

import bisect

ALIGNMENT = 64


class Space:
    """Bytes ``start`` to ``stop``, taken in parts. Not for several threads."""

    def __init__(self, start: int, stop: int):
        self._free = [(start, stop)]  # Invariant: sorted, not empty, no two touch
        self._taken: dict[int, int] = {}  # start: stop
        self.largest = stop - start  # what could ever be taken at once

    @property
    def free_bytes(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def take(self, size: int) -> int | None:
        """The start of so many bytes, aligned; None if no free part is large enough."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                self._taken[start] = start + size
                return start
        return None

    def free(self, start: int) -> None:
        """Give back what ``take`` gave."""
        stop = self._taken.pop(start)
        index = bisect.bisect(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))
