"""What steps, transfers and swaps really take, held against a profile, which follows them slowly.

The fit at warm-up had an idle machine for a moment; what runs beside the instance later it could not know. A factor
per kind of step (packed, or one token per row) is the median over the last measurements, so that it says what is usual
and a few steps that something held up change nothing; a profile that has moved by a tenth is news. Pure: nothing here
reads a clock.
"""

import dataclasses
import math
from collections import deque
from statistics import median

from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.fitting import per_call_and_item
from jmemserve.scheduler.plan import StepShape

WEIGHT = 0.05  # of the newest measurement, in the mean error
RECENT = 64  # steps of a kind that say what is usual
MOVED = 0.1  # a profile is told when a cost has moved by this share
ENOUGH = 16  # measurements before a cost is corrected
FAR = 4.0  # an error counts as at most so much
KEPT = 32  # transfers, and swaps, of which the costs are those


class Refiner:
    """Of one instance. Without a profile nothing is compared."""

    def __init__(self, profile: Profile | None = None):
        self.profile = profile
        self._model = None if profile is None else CostModel(profile)
        # Measured seconds over predicted ones, of packed steps and of others.
        self._ratios: dict[bool, deque[float]] = {True: deque(maxlen=RECENT), False: deque(maxlen=RECENT)}
        self._transfers: list[tuple[int, float]] = []
        self._swaps: list[tuple[int, float]] = []
        self._error = _Mean()

    @property
    def error(self) -> float:
        """Mean of |predicted - measured| / measured over the last steps; 0: nothing was compared."""
        return self._error.value

    def step(self, shape: StepShape, new: int, pairs: float, context: int, seconds: float) -> None:
        """A step of so many new tokens, pairs and so much context (see ``cost_model.work``) took so long."""
        if self._model is None or seconds <= 0:
            return
        predicted = self._model.step_s(shape, new, pairs, context)
        self._error.add(min(FAR, abs(predicted - seconds) / seconds))
        if predicted > 0:
            self._ratios[shape.tokens > shape.seqs].append(seconds / predicted)

    def transfer(self, blocks: int, seconds: float) -> None:
        """So many blocks came from another instance in so long."""
        self._transfers = _append(self._transfers, blocks, seconds)

    def swap(self, blocks: int, seconds: float) -> None:
        """So many blocks came from host memory in so long."""
        self._swaps = _append(self._swaps, blocks, seconds)

    def news(self) -> Profile | None:
        """The profile, if it has moved since it was told last."""
        old = self.profile
        if old is None:
            return None
        changes: dict[str, float | tuple] = {}
        for packed, ratios in self._ratios.items():
            if len(ratios) >= ENOUGH and _moved(1.0, factor := median(ratios)):
                changes |= _scaled(dataclasses.replace(old, **changes), packed, factor)  # type: ignore[arg-type]
                ratios.clear()
        for name, points in (("transfer", self._transfers), ("swap", self._swaps)):
            if len(points) < ENOUGH:
                continue
            call, block = per_call_and_item(points)
            typical = sorted(blocks for blocks, _ in points)[len(points) // 2]
            before = getattr(old, f"{name}_call_s") + typical * getattr(old, f"{name}_block_s")
            if _moved(before, call + typical * block):
                changes |= {f"{name}_call_s": call, f"{name}_block_s": block}
        if not changes:
            return None
        self.profile = dataclasses.replace(old, **changes)  # type: ignore[arg-type]
        self._model = CostModel(self.profile)
        return self.profile


@dataclasses.dataclass(slots=True)
class _Mean:
    """Exponentially weighted; the first measurements count alike."""

    value: float = 0.0
    count: int = 0

    def add(self, new: float) -> None:
        self.count += 1
        self.value += max(WEIGHT, 1 / self.count) * (new - self.value)


def _append(points: list[tuple[int, float]], blocks: int, seconds: float) -> list[tuple[int, float]]:
    if blocks <= 0 or not 0 < seconds < math.inf:
        return points
    return [*points, (blocks, seconds)][-KEPT:]


def _moved(before: float, after: float) -> bool:
    return abs(after - before) > MOVED * before


def _scaled(profile: Profile, packed: bool, factor: float) -> dict[str, float | tuple]:
    """The constants of one kind of step, times a factor."""
    steps = tuple((t, s, seconds * factor if (t > s) is packed else seconds) for t, s, seconds in profile.steps)
    name = "pair_s" if packed else "context_s"
    return {"steps": steps, name: getattr(profile, name) * factor}
