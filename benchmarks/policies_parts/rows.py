"""What was measured of one request, and of one run."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Row = dict[str, str | int | float]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """One request; tokens, and seconds since it was sent."""

    prompt: int
    cached: int
    first_s: float
    last_s: float
    tokens: int = 0  # of the answer


def row(where: str, policy: str, ratio: int, asked: Sequence[Asked], computed: Mapping[str, int]) -> Row:
    """The figures of a run. ``computed``: prompt tokens by prefill instance."""
    first = [1e3 * one.first_s for one in asked]
    work = list(computed.values())
    return {
        "where": where,
        "policy": policy,
        "ratio": ratio,
        "requests": len(asked),
        "ttft_p50_ms": float(np.percentile(first, 50)),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "jct_p50_ms": float(np.percentile([1e3 * one.last_s for one in asked], 50)),
        "hit_rate": sum(one.cached for one in asked) / sum(one.prompt for one in asked),
        "imbalance": max(work) * len(work) / max(1, sum(work)),
    }
