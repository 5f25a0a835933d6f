"""Instances of one kind share one cost model, each with a pace of its own.

Every instance measures its costs, so no two profiles are equal; but those of equal machines differ by little more than
a factor. A decision looks at the costs of what each instance holds, and most hold nothing: with one model for all of
them that is worked out once, which is most of what a decision among many instances would take.
"""

from statistics import median

from jmemserve.scheduler.cost_model import CostModel, Profile

ALIKE = 1.3  # no step of one kind is more than this much further from the model than the median step


class Kinds:
    """The cost models of a router's instances."""

    def __init__(self) -> None:
        self._models: dict[tuple[tuple[int, int], ...], list[CostModel]] = {}  # by the shapes of their steps

    def place(self, profile: Profile) -> tuple[CostModel, float]:
        """The model of the profile's kind, and how much slower this one is. Raises ConfigError if it is no profile."""
        shapes = tuple((tokens, seqs) for tokens, seqs, _ in profile.steps)
        models = self._models.setdefault(shapes, [])
        for model in models:
            ratios = [
                mine / theirs for (*_, mine), (*_, theirs) in zip(profile.steps, model.profile.steps, strict=True)
            ]
            pace = median(ratios)
            if max(ratios) <= ALIKE * pace and min(ratios) >= pace / ALIKE and profile.tile == model.profile.tile:
                return model, pace
        model = CostModel(profile)
        models.append(model)
        return model, 1.0
