"""Measured and simulated times of all requests, as shares of requests that took no longer."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(curves: Mapping[str, Mapping[str, list[float]]], path: Path, title: str) -> None:
    """A panel per arrangement."""
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False)
    for (mesh, lines), axis in zip(curves.items(), axes[0], strict=True):
        for number, (name, values) in enumerate(lines.items()):
            shares = [(place + 1) / len(values) for place in range(len(values))]
            axis.plot(values, shares, "--" if "simulated" in name else "-", color=f"C{number // 2}", label=name)
        axis.set(xlabel="ms", ylabel="share of requests", title=mesh, xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
