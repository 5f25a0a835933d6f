"""One picture of a run: a panel for each thing that was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Tables = dict[str, list[dict[str, Any]]]
OURS, PAPER = "-o", ":"


def draw(parts: dict[str, Tables], path: Path, title: str) -> None:
    """Write a PNG with the panels of these parts (tables by part); nothing if none of them has one."""
    panels = [(PANELS[name], tables) for name, tables in parts.items() if name in PANELS and tables]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 4.2 * rows), squeeze=False)
    for axis, (panel, tables) in zip(axes.flat, panels, strict=False):
        panel(axis, tables)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(axis: Axes, rows: Sequence[dict[str, Any]], x: str, y: str, label: str, style: str = OURS) -> None:
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)


def _api(axis: Axes, tables: Tables) -> None:
    rows = tables["alloc and free"]
    for column in ("alloc", "free"):
        _line(axis, rows, "blocks", f"{column}_us", column)
        _line(axis, rows, "blocks", f"paper_{column}_us", f"{column}, paper", PAPER)
    shares = tables["insert and match by cached share"]
    largest = max(row["blocks"] for row in shares)
    mine = [row | {"at": largest * row["cached_percent"] / 100} for row in shares if row["blocks"] == largest]
    for kind in ("list", "int32"):
        own = [row for row in mine if row["tokens"] == kind]
        _line(axis, own, "at", "match_us", f"match of {largest}, {kind}, by cached blocks")
        _line(axis, own, "at", "insert_us", f"insert of {largest}, {kind}, by cached blocks")
    axis.set(xlabel="blocks", ylabel="us", title="calls of the pool")


def _index(axis: Axes, tables: Tables) -> None:
    rows = tables["nothing cached: look-up and insert"]
    for name in ("radix", "xxh3_chain", "sha256_chain", "whole_prefix"):
        _line(axis, rows, "tokens", f"{name}_ms", name)
    _line(axis, rows, "tokens", "paper_radix_ms", "radix, paper", PAPER)
    _line(axis, rows, "tokens", "paper_hash_ms", "hash, paper", PAPER)
    axis.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log", title="look-up and insert, nothing cached")


def _blocks(axis: Axes, tables: Tables) -> None:
    for title, rows in tables.items():
        for kind in dict.fromkeys(row["block"] for row in rows):
            mine = [row for row in rows if row["block"] == kind]
            _line(axis, mine, "streams", "discrete_over_agg", f"{title.split(', ')[-1]}, {kind} blocks")
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set(xlabel="transfers at once", ylabel="discrete / aggregated", title="time of a prompt's keys and values")


def _transfer(axis: Axes, tables: Tables) -> None:
    for title, rows in tables.items():
        if title == "limits":
            axis.axhline(rows[0]["copy_gb_s"], color="black", linewidth=0.8, label="memory copy")
            axis.axhline(rows[0]["tcp_gb_s"], color="grey", linewidth=0.8, label="bare socket")
            continue
        mine = [row for row in rows if row["from"] == row["to"] == "HBM"]
        _line(axis, mine, "mib", "verb_gb_s", title)
        _line(axis, mine, "mib", "bare_gb_s", f"{title}, bare", "--")
    axis.set(xlabel="MiB", ylabel="GB/s", xscale="log", yscale="log", title="transfer, HBM to HBM, checked")


def _swap(axis: Axes, tables: Tables) -> None:
    rows = tables["GB/s by blocks"]
    for kind in dict.fromkeys(row["arena"] for row in rows):
        for way in ("out", "in"):
            _line(axis, [row for row in rows if row["arena"] == kind], "mib", f"{way}_gb_s", f"swap {way}, {kind}")
    axis.set(xlabel="MiB", ylabel="GB/s", xscale="log", title="swaps")


def _layout(axis: Axes, tables: Tables) -> None:
    (rows,) = tables.values()
    names = [f"{row['what']} {row['size']}" for row in rows]
    axis.bar(names, [row["discrete_over_aggregated"] for row in rows], label="discrete / aggregated")
    axis.axhline(1, color="black", linewidth=0.5)
    axis.tick_params(axis="x", labelsize=6)
    axis.set(ylabel="ratio of times", title="engine by layout of its pages")


PANELS = {
    "api": _api,
    "index": _index,
    "blocks": _blocks,
    "transfer": _transfer,
    "swap": _swap,
    "layout": _layout,
}
