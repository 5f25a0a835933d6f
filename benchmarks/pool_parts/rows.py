"""What every part of the pool's benchmark gives back, and how it is timed and shown."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]  # one measurement: what was varied, and the figures


@dataclasses.dataclass(frozen=True, slots=True)
class Aim:
    """A figure that the project wants to reach."""

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False  # else: at most

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict, sign = "pass" if self.met else "FAIL", ">=" if self.at_least else "<="
        return f"{verdict}  {self.what}: {self.value:.3g} {self.unit} (aim {sign} {self.limit:g})"


@dataclasses.dataclass(slots=True)
class Part:
    """The result of one part: its tables by name, its aims, and remarks that belong to the figures."""

    tables: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    aims: list[Aim] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        aims = [dataclasses.asdict(aim) | {"met": aim.met} for aim in self.aims]
        return {"tables": self.tables, "aims": aims, "remarks": self.remarks}

    def show(self, name: str) -> None:
        """Print the tables, the remarks and the aims."""
        for title, rows in self.tables.items():
            print(f"\n== {name}: {title}")
            print_rows(rows)
        for remark in self.remarks:
            print(f"note: {remark}")
        for aim in self.aims:
            print(aim)


def print_rows(rows: Sequence[Row]) -> None:
    """Rows with equal keys as a table."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    return float(np.median(values))
