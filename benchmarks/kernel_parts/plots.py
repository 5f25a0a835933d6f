"""Shares of peak as bars, a panel per part."""

from pathlib import Path

from kernel_parts.cases import Peaks, Row


def draw(rows: list[Row], peaks: Peaks, path: Path, title: str) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = list(dict.fromkeys(row.part for row in rows))
    longest = max(len([row for row in rows if row.part == part]) for part in parts)
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 1 + 0.22 * longest), squeeze=False)
    colours = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row.by for row in rows))}
    for axis, part in zip(axes[0], parts, strict=True):
        own = [row for row in rows if row.part == part][::-1]
        names = [f"{row.case}, {row.by}" for row in own]
        axis.barh(names, [100 * row.share(peaks) for row in own], color=[colours[row.by] for row in own])
        axis.set_title(part)
        axis.set_xlabel("% of peak")
        axis.tick_params(axis="y", labelsize=6)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
