"""What an instance tells the front-end of its cache: a snapshot first, then every change, in order."""

from collections import deque
from collections.abc import Callable

from jmemserve.kvpool import BlockPool
from jmemserve.kvpool.events import Removed, Snapshot, Stored
from jmemserve.scheduler.messages import CacheNews, CacheSnapshot

PERIOD_S = 0.01  # between two messages
PART_BLOCKS = 2048  # of one message, about; the front-end decides nothing while it takes one in
MAX_EVENTS = 4096  # that may be waiting: a snapshot is cheaper than more


class CacheTeller:
    """Of one pool; call from its owner's thread. Says nothing before ``begin``."""

    def __init__(self, pool: BlockPool, say: Callable[[CacheNews | CacheSnapshot], None]):
        self._pool, self._say = pool, say
        self.begun = False
        self._told: int | None = None  # number of the last event that the front-end has heard of
        self._parts: deque[CacheSnapshot] = deque()
        self._next = 0.0

    def begin(self) -> None:
        """Tell all that is cached now, and every change from now on."""
        self.begun = True
        if self._pool.log is None:
            return
        snapshot = self._pool.snapshot()
        self._told = snapshot.number
        parts = list(_parts(snapshot.stored))
        self._parts = deque(
            CacheSnapshot(Snapshot(snapshot.number, part), place == 0, place == len(parts) - 1)
            for place, part in enumerate(parts)
        )

    def end(self) -> None:
        """The front-end that listened is gone."""
        self._told = None
        self._parts.clear()

    @property
    def behind(self) -> bool:
        """Is there something that the front-end has not heard of?"""
        log = self._pool.log
        return self._told is not None and log is not None and (bool(self._parts) or log.last > self._told)

    def poll(self, now: float) -> None:
        """Say what is due: never much at once."""
        log = self._pool.log
        if self._told is None or log is None or now < self._next:
            return
        if self._parts:
            self._say(self._parts.popleft())
        elif log.last > self._told:
            events = log.since(self._told) if log.last - self._told <= MAX_EVENTS else None
            if events is None:
                self.begin()
                return
            some = _first(events)
            self._told += len(some)
            self._say(
                CacheNews(
                    tuple(event for event in some if isinstance(event, Stored)),
                    tuple(event for event in some if isinstance(event, Removed)),
                )
            )
        else:
            return
        self._next = now + PERIOD_S


def _parts(stored: tuple[Stored, ...]) -> list[tuple[Stored, ...]]:
    """Of a snapshot: at least one."""
    parts: list[tuple[Stored, ...]] = []
    part: list[Stored] = []
    blocks = 0
    for run in stored:
        if part and blocks + len(run.ids) > PART_BLOCKS:
            parts.append(tuple(part))
            part, blocks = [], 0
        part.append(run)
        blocks += len(run.ids)
    return [*parts, tuple(part)]


def _first(events: list[Stored | Removed]) -> list[Stored | Removed]:
    """As many events as one message may have; at least one."""
    blocks = 0
    for place, event in enumerate(events):
        blocks += len(event.ids)
        if place and blocks > PART_BLOCKS:
            return events[:place]
    return events
