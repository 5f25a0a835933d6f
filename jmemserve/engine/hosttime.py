"""What the host does for each step, in seconds, and how long a device has to wait for it.

    result on the host -> commit -> messages -> plan -> arrays -> dispatch    the step after the next one is launched
    <---------------------------------- gap ---------------------------->

One flight is in the air meanwhile: a device waits only where its step is over before the gap is. Steps that were
launched too late for that are counted as *starved*.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median

from jmemserve.engine.runner import Flight
from jmemserve.types import HostTimes

RECENT = 256  # steps that say what is usual


class HostClock:
    """Of one instance; told by its thread, read by any."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=RECENT)  # plan, arrays, dispatch
        self._commits: deque[float] = deque(maxlen=RECENT)
        self._gaps: deque[float] = deque(maxlen=RECENT)
        self._landed = 0.0  # when a result came last, 0 after the device had nothing to do
        self.starved = 0

    def landed(self, now: float) -> None:
        """The result of a step is on the host."""
        self._landed = now

    def committed(self, seconds: float) -> None:
        """The result of a step was made use of, in so long."""
        self._commits.append(seconds)

    def launched(self, flight: Flight, plan_s: float, before: Flight | None) -> None:
        """A step is in the air; ``before``: the one that was launched last, if its result was not taken yet."""
        self._steps.append((plan_s, flight.arrays_s, flight.dispatch_s))
        if self._landed:
            self._gaps.append(flight.launched - self._landed)
        if before is not None and before.over:
            self.starved += 1

    def rest(self) -> None:
        """There is nothing to do: what comes next had not to wait for this host."""
        self._landed = 0.0

    def times(self) -> HostTimes:
        """Medians of the last steps."""
        steps = list(self._steps)
        plan, arrays, dispatch = (_median([step[part] for step in steps]) for part in range(3))
        return HostTimes(plan, arrays, dispatch, _median(self._commits), _median(self._gaps), self.starved)


def _median(values: Iterable[float]) -> float:
    return median(some) if (some := list(values)) else 0.0
