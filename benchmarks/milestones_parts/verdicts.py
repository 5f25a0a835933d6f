"""What was expected of the times, and whether the figures show it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from milestones_parts.tokens import Measured

Row = dict[str, float | int | str | None]
FIGURES = ("ttft_ms", "jct_ms", "tpot_ms", "second_ms", "computed", "forward", "back")


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """One expectation; where there is none, ``holds`` is None, and the figures are only told."""

    holds: bool | None
    what: str
    figures: str

    def __str__(self) -> str:
        word = {True: "holds", False: "DOES NOT HOLD", None: "beside"}[self.holds]
        return f"{word}: {self.what} ({self.figures})"


def medians(measured: Sequence[Measured]) -> list[Row]:
    """A row for each arrangement and turn, over sessions and repeats."""
    rows: list[Row] = []
    for name in dict.fromkeys(one.arrangement for one in measured):
        own = [one for one in measured if one.arrangement == name]
        for turn in sorted({one.turn for one in own}):
            same = [one for one in own if one.turn == turn]
            row: Row = {"arrangement": name, "turn": turn, "prompt": float(np.median([one.prompt for one in same]))}
            for figure in FIGURES:
                values = [value for one in same if (value := getattr(one, figure)) is not None]
                row[figure] = float(np.median(values)) if values else None
            rows.append(row)
    return rows


def judge(rows: Sequence[Row], flat: float) -> list[Verdict]:
    """The expectations that these rows can show; ``flat``: what counts as flat, last turn over first."""
    tables = {
        name: [row for row in rows if row["arrangement"] == name] for name in (row["arrangement"] for row in rows)
    }
    found = []
    if basic := tables.get("PD-Basic"):
        ratio, grown = _last_over_first(basic, "ttft_ms"), _last_over_first(basic, "prompt")
        what = "PD-Basic's TTFT grows with the whole history: half as fast as the prompt, or faster"
        found.append(Verdict(ratio - 1 >= (grown - 1) / 2, what, f"{ratio:.2f}x, the prompt {grown:.2f}x"))
    if full := tables.get("PD-Caching-3"):
        ratio = _last_over_first(full, "ttft_ms")
        what = f"PD-Caching-3's TTFT stays flat: at most {flat:g}x the first turn's at the last"
        found.append(Verdict(ratio <= flat, what, f"{ratio:.2f}x"))
    for name in ("PD-Caching-1", "PD-Caching-2"):
        if name in tables and full and basic:
            found.append(_pays_for_answers(name, tables[name], full, _token_ms(basic)))
    for less, more in (("PD-Caching-3", "PD-Caching-2"), ("PD-Caching-2", "PD-Basic")):
        if less in tables and more in tables:
            found += [_compare(less, tables[less], more, tables[more], figure) for figure in ("ttft_ms", "jct_ms")]
    for name in ("PD-Caching-3", "PD-Caching-2", "PD-Caching-1", "PD-Basic"):
        if name in tables and "PD-CC" in tables:
            found.append(_beside(tables["PD-CC"], name, tables[name]))
    return found


def _pays_for_answers(name: str, own: Sequence[Row], full: Sequence[Row], token_ms: float) -> Verdict:
    """Without what decoding made, each later turn computes the last answer."""
    pairs = list(zip(own[1:], full[1:], strict=True))
    more_ms = float(np.median([a["ttft_ms"] - b["ttft_ms"] for a, b in pairs])) if pairs else 0.0  # type: ignore[operator]
    tokens = float(np.median([a["computed"] - b["computed"] for a, b in pairs])) if pairs else 0.0  # type: ignore[operator]
    what = f"{name}'s TTFT has the last answer on top of PD-Caching-3's: half of what its tokens cost, or more"
    figures = f"{more_ms:+.1f} ms for {tokens:g} tokens, at {token_ms:.3f} ms each in PD-Basic {tokens * token_ms:.1f}"
    return Verdict(tokens > 0 and more_ms >= tokens * token_ms / 2, what, figures)


def _compare(less: str, own: Sequence[Row], more: str, other: Sequence[Row], figure: str) -> Verdict:
    a, b = float(own[-1][figure] or 0), float(other[-1][figure] or 0)
    short = figure.removesuffix("_ms").upper()
    return Verdict(a < b, f"{less}'s {short} is below {more}'s at the last turn", f"{a:.1f} and {b:.1f} ms")


def _beside(colocated: Sequence[Row], name: str, other: Sequence[Row]) -> Verdict:
    """Two colocated instances and an arrangement with roles: medians over the turns that have a history."""
    words, figures = [], []
    for figure in ("ttft_ms", "jct_ms"):
        a, b = (float(np.median([float(row[figure] or 0) for row in rows[1:] or rows])) for rows in (colocated, other))
        short = figure.removesuffix("_ms").upper()
        words.append(f"{'beats' if a < b else 'does not beat'} {name} in {short}")
        figures.append(f"{short} {a:.1f} and {b:.1f} ms")
    return Verdict(None, "PD-CC " + ", and ".join(words), "; ".join(figures) + ", over later turns")


def _last_over_first(rows: Sequence[Row], figure: str) -> float:
    return float(rows[-1][figure] or 0) / float(rows[0][figure] or 1)


def _token_ms(rows: Sequence[Row]) -> float:
    """What a computed token costs: the slope of PD-Basic's TTFT."""
    if len(rows) < 2:
        return 0.0
    return float(
        np.polyfit([float(row["computed"] or 0) for row in rows], [float(row["ttft_ms"] or 0) for row in rows], 1)[0]
    )
