"""Figure 15, and what the paper did not show."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from policies_parts.rows import Row

matplotlib.use("Agg")
from matplotlib import pyplot

FIGURES = (
    ("ttft_p50_ms", "TTFT P50, ms"),
    ("ttft_p99_ms", "TTFT P99, ms"),
    ("hit_rate", "hit rate"),
    ("imbalance", "imbalance"),
)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A line of panels per cluster, bars by policy for each share ratio."""
    places = list(dict.fromkeys(str(row["where"]) for row in rows))
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    ratios = sorted({int(row["ratio"]) for row in rows})
    figure, axes = pyplot.subplots(len(places), len(FIGURES), figsize=(16, 3.4 * len(places)), squeeze=False)
    for place, line in zip(places, axes, strict=True):
        for (key, label), axis in zip(FIGURES, line, strict=True):
            for number, policy in enumerate(policies):
                own = {int(r["ratio"]): float(r[key]) for r in rows if (r["where"], r["policy"]) == (place, policy)}
                width = 0.8 / len(policies)
                axis.bar(
                    [at + number * width for at in range(len(ratios))],
                    [own.get(r, 0) for r in ratios],
                    width,
                    label=policy,
                )
            axis.set_xticks([at + 0.4 for at in range(len(ratios))], [str(ratio) for ratio in ratios])
            axis.set(xlabel="share ratio", ylabel=label, title=place)
            if "ms" in label:
                axis.set_yscale("log")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
