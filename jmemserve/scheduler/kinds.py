"""Instances of one kind share one cost model, each with a pace of its own.

Every instance measures its costs, so no two profiles are equal; but those of equal machines differ by little more than
a factor. A decision looks at the costs of what each instance holds, and most hold nothing: with one model for all of
them that is worked out once, which is most of what a decision among many instances would take.
"""

from collections.abc import Iterable
from statistics import median

from jmemserve.scheduler.cost_model import CostModel, Profile

ALIKE = 1.3  # no cost of one kind is more than this much further from the model than the pace says
SOME, MANY = 1, 64  # blocks
CONTEXT = 1 << 14  # tokens


class Kinds:
    """The cost models of a router's instances."""

    def __init__(self) -> None:
        self._models: list[CostModel] = []
        self._used: dict[str, CostModel] = {}  # by instance

    def place(self, instance: str, profile: Profile) -> tuple[CostModel, float]:
        """The model of the profile's kind, and how much slower this one is. Raises ConfigError if it is no profile."""
        own = CostModel(profile)
        self.leave(instance)
        for model in self._models:
            pace = _pace(own, model)
            if pace is not None:
                self._used[instance] = model
                return model, pace
        self._models.append(own)
        self._used[instance] = own
        return own, 1.0

    def leave(self, instance: str) -> None:
        """The instance is gone, or costs something else now; a model that nobody has is forgotten."""
        model = self._used.pop(instance, None)
        if model is not None and not any(other is model for other in self._used.values()):
            self._models.remove(model)

    def __len__(self) -> int:
        return len(self._models)


def _way(costs: CostModel) -> tuple[int, bool]:
    """How work is counted."""
    return costs.profile.tile, costs.profile.padding_free


def _pace(own: CostModel, model: CostModel) -> float | None:
    """How much slower all that the one computes is than with the other; None: they are of different kinds."""
    steps, others = own.profile.steps, model.profile.steps
    if [step[:2] for step in steps] != [step[:2] for step in others] or _way(own) != _way(model):
        return None
    ratios = [mine / theirs for (*_, mine), (*_, theirs) in zip(steps, others, strict=True)]
    pace = median(ratios)
    computing = [mine / theirs for mine, theirs in zip(_long(own), _long(model), strict=True)]
    if not _near([*ratios, *computing], pace):
        return None
    moving = zip(_moves(own), _moves(model), strict=True)
    return (
        pace
        if all(_near([mine / theirs], 1.0) if mine and theirs else mine == theirs for mine, theirs in moving)
        else None
    )


def _near(ratios: Iterable[float], pace: float) -> bool:
    return all(pace / ALIKE <= ratio <= ALIKE * pace for ratio in ratios)


def _long(model: CostModel) -> tuple[float, ...]:
    """What shows the costs of attention."""
    return model.prefill_s(CONTEXT, 0), model.decode_step_s(1, CONTEXT)


def _moves(model: CostModel) -> tuple[float, ...]:
    """What shows the costs of moving blocks."""
    return tuple(cost(blocks) for cost in (model.transfer_s, model.swap_in_s) for blocks in (SOME, MANY))
