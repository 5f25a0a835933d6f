"""From measured seconds to the constants of a cost model, at the paper's two levels (section 5.3.2).

operator level   seconds = base of the step's shape + pairs * pair_s + context * context_s, no constant below 0
architecture     seconds of a whole prefill = a polynomial of its length x and cached share y

Errors count relative to what was measured, so that short steps matter as much as long ones. A busy machine makes some
steps slow and none fast: of repeats the lower median stands, and samples that stay far off are left out.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jmemserve.errors import ConfigError
from jmemserve.scheduler.cost_model import Profile
from jmemserve.scheduler.plan import StepShape

OUTLIER = 4.0  # times the median deviation: such a sample is left out
LEAST = 0.01  # of a step's seconds, for its base
TOLERATED = 0.05  # and never one that is nearer than this share


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What steps of one shape and one amount of work took."""

    shape: StepShape
    pairs: float
    context: int
    seconds: float


def typical(seconds: Sequence[float]) -> float:
    """The lower median."""
    return statistics.median_low(seconds)


def fit(
    samples: Sequence[Sample], shapes: Sequence[StepShape], tile: int = 1, padding_free: bool = False, about: str = ""
) -> Profile:
    """The operator-level constants, with a base for each of ``shapes``.

    Those that were not measured lie between their neighbours of the same kind, or cost in proportion to the nearest;
    of one kind a larger shape never costs less than a smaller. Raises ConfigError if no packed step was measured.
    """
    if not any(sample.shape.tokens > sample.shape.seqs for sample in samples):
        raise ConfigError("costs cannot be fitted: no step of more tokens than sequences was measured")
    kept = list(samples)
    while True:
        bases, pair_s, context_s = _solve(kept)
        off = [(bases[s.shape] + s.pairs * pair_s + s.context * context_s) / s.seconds - 1 for s in kept]
        limit = max(TOLERATED, OUTLIER * statistics.median(abs(error) for error in off))
        worst = max(range(len(kept)), key=lambda place: abs(off[place]))
        alone = sum(sample.shape == kept[worst].shape for sample in kept) == 1
        if abs(off[worst]) <= limit or alone or 2 * (len(kept) - 1) < len(samples):
            break
        del kept[worst]
    steps = [*_table(bases, shapes, packed=False), *_table(bases, shapes, packed=True)]
    return Profile(tuple(sorted(steps)), pair_s, context_s, about=about, tile=tile, padding_free=padding_free)


def per_call_and_item(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds per call, seconds per item) from (items, seconds), neither below 0."""
    if not points:
        return 0.0, 0.0
    items, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    call, item = nnls(np.stack((np.ones_like(items), items), 1) / seconds[:, None], np.ones_like(items))
    return float(call), float(item)


@dataclasses.dataclass(frozen=True, slots=True)
class ArchModel:
    """seconds = sum of ``factors`` times (1, x, x^2, x y, x^2 y) for x tokens of which the share y is cached.

    It knows nothing of shapes or chunks; another mesh or model needs all measurements again.
    """

    factors: tuple[float, ...]

    @staticmethod
    def fit(points: Sequence[tuple[int, int, float]]) -> "ArchModel":
        """From whole prefills, (tokens, cached tokens, seconds). Raises ConfigError if there are fewer than factors."""
        if len(points) < len(_terms(1, 0)):
            raise ConfigError(f"an architecture-level fit needs {len(_terms(1, 0))} prefills, not {len(points)}")
        seconds = np.array([point[2] for point in points])
        table = np.array([_terms(tokens, cached) for tokens, cached, _ in points]) / seconds[:, None]
        scale = np.abs(table).max(0)
        scale[scale == 0] = 1.0
        factors = np.linalg.lstsq(table / scale, np.ones(len(points)), rcond=None)[0] / scale
        return ArchModel(tuple(factors.tolist()))

    def prefill_s(self, tokens: int, cached: int) -> float:
        """What a prompt takes; never below 0."""
        terms = _terms(tokens, cached)
        return max(0.0, sum(factor * term for factor, term in zip(self.factors, terms, strict=True)))

    def scaled(self, factor: float) -> "ArchModel":
        """The paper's way to other meshes: at twice the devices, half the time."""
        return ArchModel(tuple(factor * own for own in self.factors))


def mean_error(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean of |predicted - measured| / measured, from (predicted, measured)."""
    return statistics.fmean(abs(predicted - measured) / measured for predicted, measured in pairs)


def nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x without negative parts for which ``matrix @ x`` is nearest to ``target`` (Lawson and Hanson, 1974).

    Grows the set of parts that may be above 0 by the one that helps most, and shrinks it where one falls below.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled, x, free = matrix / scale, np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], bool)
    for _ in range(10 * matrix.shape[1]):
        slope = np.where(free, -np.inf, scaled.T @ (target - scaled @ x))
        if free.all() or slope.max() <= 1e-10 * np.linalg.norm(target):
            break
        free[slope.argmax()] = True
        while True:
            best = np.zeros_like(x)
            best[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            bad = free & (best <= 0)
            if not bad.any():
                x = best
                break
            x = x + (x[bad] / (x[bad] - best[bad])).min() * (best - x)
            free &= x > 1e-14
    return x / scale


def _solve(samples: Sequence[Sample]) -> tuple[dict[StepShape, float], float, float]:
    """(base of each measured shape, pair_s, context_s)."""
    shapes = sorted({sample.shape for sample in samples})
    table = np.zeros((len(samples), len(shapes) + 2))
    for row, sample in zip(table, samples, strict=True):
        row[shapes.index(sample.shape)] = 1 / sample.seconds
        row[-2:] = sample.pairs / sample.seconds, sample.context / sample.seconds
    *bases, pair_s, context_s = nnls(table, np.ones(len(samples))).tolist()
    for place, shape in enumerate(shapes):  # never 0, even where noise has hidden it behind its attention
        least = LEAST * min(sample.seconds for sample in samples if sample.shape == shape)
        bases[place] = max(least, bases[place])
    return dict(zip(shapes, bases, strict=True)), pair_s, context_s


def _table(bases: Mapping[StepShape, float], shapes: Sequence[StepShape], packed: bool) -> list[tuple[int, int, float]]:
    """Rows of ``Profile.steps`` for all shapes of one kind."""
    known = sorted((shape.tokens, base) for shape, base in bases.items() if (shape.tokens > shape.seqs) is packed)
    if not known:
        return []
    sizes, seconds = (np.array(column, float) for column in zip(*known, strict=True))
    seconds = np.maximum.accumulate(seconds)
    rows = []
    for shape in sorted({*shapes, *bases}):
        if (shape.tokens > shape.seqs) is not packed:
            continue
        base = float(np.interp(shape.tokens, sizes, seconds))
        if shape.tokens > sizes[-1]:
            base *= shape.tokens / sizes[-1]
        rows.append((shape.tokens, shape.seqs, base))
    return rows


def _terms(tokens: int, cached: int) -> tuple[float, ...]:
    x, y = float(tokens), cached / tokens
    return 1.0, x, x * x, x * y, x * x * y
