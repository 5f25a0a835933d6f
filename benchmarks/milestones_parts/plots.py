"""One picture of a run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from milestones_parts.verdicts import Row  # noqa: E402

PANELS = (
    ("ttft_ms", "TTFT (ms)", "time to the first token"),
    ("computed", "tokens", "computed before the first token"),
    ("forward", "tokens", "moved from prefill to decode (dotted: back)"),
    ("jct_ms", "JCT (ms)", "time to the last token"),
)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: a panel per figure, a line per arrangement, turns to the right."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.4), constrained_layout=True)
    names = list(dict.fromkeys(str(row["arrangement"]) for row in rows))
    for axis, (figure_name, label, about) in zip(axes.flat, PANELS, strict=True):
        for number, name in enumerate(names):
            size = 1 + 0.4 * (len(names) - number)  # lines that coincide are seen nevertheless
            style = {"marker": "os^Dv"[number % 5], "color": f"C{number}", "markersize": 2.5 * size, "linewidth": size}
            own = [row for row in rows if row["arrangement"] == name]
            _line(axis, own, figure_name, label=name, **style)
            if figure_name == "forward":
                _line(axis, [row for row in own if row["back"]], "back", linestyle=":", **style)
        axis.set(xlabel="turn", ylabel=label, title=about)
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _line(axis: pyplot.Axes, rows: Sequence[Row], figure: str, **style: object) -> None:
    points = [(row["turn"], row[figure]) for row in rows if row[figure] is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)
