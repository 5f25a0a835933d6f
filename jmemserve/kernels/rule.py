"""What a token of a layer sees, and how its scores are made: static, so a part of the compiled step."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Scores are query times key times ``scale``; with a soft cap they become ``cap * tanh(score / cap)``."""

    scale: float
    window: int | None = None  # a token sees at most that many tokens, itself included; None: all before it
    soft_cap: float | None = None
