"""Mispredictions and TTFT over the life of an entry, with a line per size of pool."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from pool_parts.rows import Row

PANELS = {
    "false_hits": "expected, but not there (% of prompt tokens)",
    "missed_hits": "there, but not expected (% of prompt tokens)",
    "hit_rate": "found cached (% of prompt tokens)",
    "ttft_p50_s": "TTFT P50 (s)",
}


def draw(rows: list[Row], path: Path, title: str) -> None:
    """A panel per figure; what events give is a dashed line, since they know no life."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4))
    pools = list(dict.fromkeys(row["pool_tokens"] for row in rows))
    for (name, label), axis in zip(PANELS.items(), axes, strict=True):
        factor = 1 if name.endswith("_s") else 100
        for number, pool in enumerate(pools):
            own = [row for row in rows if row["pool_tokens"] == pool]
            timed = [row for row in own if row["ttl_s"] is not None]
            axis.plot(
                [row["ttl_s"] for row in timed],
                [factor * row[name] for row in timed],
                "o-",
                color=f"C{number}",
                label=f"responses, pools of {pool // 1024}K tokens",
            )
            for row in own:
                if row["ttl_s"] is None:
                    axis.axhline(factor * row[name], ls="--", color=f"C{number}", label="events")
        axis.set(xscale="log", xlabel="life of an entry (s)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
