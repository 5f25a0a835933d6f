"""One picture of some runs."""

from collections.abc import Sequence
from pathlib import Path

from jmemserve.errors import ConfigError
from jmemserve.simulator.report import Row

PANELS = (
    ("ttft", 1000.0, "TTFT (ms)", "time to the first token"),
    ("tpot", 1000.0, "TPOT (ms)", "time per token after it"),
    ("jct", 1.0, "JCT (s)", "time to the last token"),
)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: a bar per run, at the median and the 99th percentile. Raises ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "jmemserve[bench]"') from None
    names = [f"{row['mesh']}, {row['policy']}, {row['caching']}" for row in rows]
    places = range(len(rows))
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 1.8 + 0.35 * len(rows)), constrained_layout=True, sharey=True)
    for axis, (name, factor, label, about) in zip(axes, PANELS, strict=False):
        axis.barh(places, [factor * row[f"{name}_p99"] for row in rows], color="C0", alpha=0.4, label="p99")
        axis.barh(places, [factor * row[f"{name}_p50"] for row in rows], color="C0", height=0.5, label="p50")
        axis.set(xlabel=label, title=about)
        axis.legend(fontsize=7)
    hbm = [100 * (row["hit_rate"] - row["hit_rate_dram"]) for row in rows]
    axes[3].barh(places, hbm, color="C2", label="HBM")
    axes[3].barh(places, [100 * row["hit_rate_dram"] for row in rows], left=hbm, color="C1", label="DRAM")
    axes[3].set(xlabel="% of prompt tokens", title="found in a cache")
    axes[3].legend(fontsize=7)
    axes[0].set_yticks(list(places), names, fontsize=7)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
