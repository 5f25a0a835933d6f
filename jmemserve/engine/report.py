"""What a person sees while a server starts: phases with seconds, and bars."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm import tqdm


class Bar(Protocol):
    """Progress of one piece of work."""

    def update(self, n: int) -> object: ...

    def close(self) -> object: ...


class Report(Protocol):
    """Where start-up progress goes."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Say that a phase begins, and at its end how long it took."""
        ...

    def bar(self, name: str, total: int, unit: str) -> Bar:
        """A bar of ``total`` units."""
        ...

    def line(self, text: str) -> None:
        """Say something."""
        ...


class ConsoleReport:
    """Bars on a terminal, one plain line per phase elsewhere; everything goes to stderr."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.line(f"  {name:<44} {time.monotonic() - start:7.2f} s")

    def bar(self, name: str, total: int, unit: str) -> Bar:
        if self._tty:
            return tqdm(
                total=total, desc=f"  {name}", unit=unit, unit_scale=total > 10_000, leave=False, file=sys.stderr
            )
        return _PlainBar(self, name, total, unit)

    def line(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class SilentReport:
    """Says nothing."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def bar(self, name: str, total: int, unit: str) -> Bar:
        return tqdm(total=total, disable=True)

    def line(self, text: str) -> None:
        pass


class _PlainBar:
    """A line whenever another quarter is done and some seconds have passed: for logs."""

    def __init__(self, report: ConsoleReport, name: str, total: int, unit: str):
        self._report, self._name, self._total, self._unit = report, name, total, unit
        self._done, self._said, self._at = 0, 0, time.monotonic()

    def update(self, n: int) -> None:
        self._done += n
        quarter = 4 * self._done // max(1, self._total)
        if quarter > self._said and time.monotonic() - self._at > 2:
            self._said, self._at = quarter, time.monotonic()
            self._report.line(f"  {self._name}: {self._done:,} of {self._total:,} {self._unit}")

    def close(self) -> None:
        pass
