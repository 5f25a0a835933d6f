"""Virtual time: a heap of what is to happen, and devices that work off their queues on it."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any


class Clock:
    """``now`` in seconds. What is due at one time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0  # events
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        """Call when it is ``time``; what lies in the past is called at once, after all that is due."""
        heapq.heappush(self._due, (max(time, self.now), next(self._numbers), call, args))

    def step(self) -> bool:
        """Let the next thing happen; False: there is none."""
        if not self._due:
            return False
        self.now, _, call, args = heapq.heappop(self._due)
        self.happened += 1
        call(*args)
        return True


class Host:
    """The cores that some devices share: of k busy ones each goes on at ``min(1, cores / k)`` of its pace.

    All busy ones go at one pace, so each ends at a fixed amount of ``work`` done by any of them.
    """

    def __init__(self, clock: Clock, cores: float | None = None):
        self._clock, self._cores = clock, cores
        self._work = self._since = 0.0  # seconds of work that a device busy from the start has done by ``_since``
        self._busy: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._plan = 0

    @property
    def shared(self) -> bool:
        """Does one that is busy slow down others?"""
        return self._cores is not None

    def run(self, seconds: float, over: Callable[[], None]) -> None:
        """Work so long, if nobody else does; then call."""
        if self._cores is None:
            self._clock.at(self._clock.now + seconds, over)
            return
        self._catch_up()
        heapq.heappush(self._busy, (self._work + seconds, next(self._numbers), over))
        self._plan_next()

    @property
    def _pace(self) -> float:
        assert self._cores is not None
        return min(1.0, self._cores / len(self._busy)) if self._busy else 1.0

    def _catch_up(self) -> None:
        self._work += (self._clock.now - self._since) * self._pace
        self._since = self._clock.now

    def _plan_next(self) -> None:
        self._plan += 1
        if self._busy:
            self._clock.at(self._clock.now + (self._busy[0][0] - self._work) / self._pace, self._next, self._plan)

    def _next(self, plan: int) -> None:
        if plan != self._plan:
            return  # others came or went meanwhile
        self._catch_up()
        self._work, _, over = heapq.heappop(self._busy)
        self._plan_next()
        over()


class Device:
    """Does one thing after the other, in the order in which they were enqueued."""

    def __init__(self, host: Host, clock: Clock):
        self._host, self._clock = host, clock
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._began = -1.0
        self.busy_s = 0.0

    def enqueue(self, seconds: float, over: Callable[[], None]) -> None:
        """Work so long when all before is done, then call."""
        self._queue.append((seconds, over))
        if len(self._queue) == 1:
            self._begin()

    @property
    def ends(self) -> float | None:
        """When it will have done all, if that is one thing in hand and nobody can slow it down."""
        if len(self._queue) != 1 or self._host.shared:
            return None
        return self._began + self._queue[0][0]

    def _begin(self) -> None:
        self._began = self._clock.now
        self._host.run(self._queue[0][0], self._over)

    def _over(self) -> None:
        self.busy_s += self._clock.now - self._began
        _, over = self._queue.popleft()
        if self._queue:
            self._begin()
        over()
