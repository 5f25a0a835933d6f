"""Measure what work costs on an instance, and how well its cost model foretells it.

    python -m jmemserve.calibrate --model DIR --output profile.json --plot costs.png
    python -m jmemserve.calibrate --model DIR --mesh model=2 --budget-s 60

Steps are measured and fitted as at the start of a server; then whole prefills of other lengths, with a part of the
prompt cached, are predicted and measured. The architecture-level fit, beside it, is made from every second of these
prefills and predicts the others. The profile is JSON: of a machine that this one only plans for, copy it from there.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmemserve.config import EngineConfig, Role, Warmup, parse_instance
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import Parts, build, check_host_memory, read_model_config
from jmemserve.engine.calibrating import describe, measure, time_prefill
from jmemserve.engine.compiles import keep_compilations
from jmemserve.engine.report import ConsoleReport
from jmemserve.errors import ConfigError, JmemserveError
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.fitting import ArchModel, mean_error, typical
from jmemserve.server.flags import add_engine_flags, make_engine_config

LENGTHS = 8  # of prompts, from 62 tokens up
SHORTEST = 62
SHARES = (0.0, 0.25, 0.5, 0.75)  # cached
REPEATS = 5  # of a prefill, at most
FIT_SHARE = 0.4  # of the budget, for the fit; the rest measures what it predicted

PICTURES = (".png", ".pdf", ".svg")
WRONG = 0.25  # mean error of a profile that is not to be trusted

Row = tuple[int, int, float, float | None]  # tokens, cached tokens, measured seconds, predicted by the other fit


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0; 2 with one sentence on stderr when it cannot be done; 130 after Ctrl-C."""
    try:
        return _run(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return 130
    except (JmemserveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jmemserve.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mesh", default="model=1", help="the instance's axes (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=30.0, help="seconds to measure (default: %(default)g)")
    parser.add_argument("--output", type=Path, help="write the profile there, as JSON")
    parser.add_argument("--plot", type=Path, help="draw predicted and measured there; needs matplotlib")
    add_engine_flags(parser, without=("calibrate_s",))
    return parser


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    mesh, budget_s, output, plot = (given.pop(name) for name in ("mesh", "budget_s", "output", "plot"))
    if not 0 < budget_s <= 86400:
        raise ConfigError(f"--budget-s must be above 0 and at most 86400 seconds, not {budget_s:g}")
    for path in (output, plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written: it is a folder, or there is no folder {path.parent}")
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {plot}: a picture ends in {', '.join(PICTURES)}")
    engine = make_engine_config(given)
    if engine.warmup is Warmup.NONE:
        raise ConfigError("--warmup none compiles nothing; costs are those of compiled steps: leave it out")
    parts = _build(engine, mesh)
    began = time.perf_counter()
    profile = measure(parts, FIT_SHARE * budget_s, f"{engine.model}, {mesh}")
    rows = measure_prefills(parts, CostModel(profile), began + budget_s)
    show(profile, rows)
    if output is not None:
        output.write_text(profile.to_json() + "\n")
        print(f"wrote {output}")
    if plot is not None:
        draw(profile, rows, plot)
    return 0


def _build(engine: EngineConfig, mesh: str) -> Parts:
    """An instance without a thread or a cluster."""
    spec, report = parse_instance(mesh, Role.COLOCATED, "colocated0"), ConsoleReport()
    arrange_cpu_devices(spec.model_axis)
    if engine.compilation_cache_dir is not None:
        keep_compilations(engine.compilation_cache_dir)
    check_host_memory(engine, 1)
    return build(spec, engine, read_model_config(engine), spec.model_axis, 0, LocalExchange(), report)


def measure_prefills(parts: Parts, model: CostModel, end: float) -> list[Row]:
    """Time prefills over lengths and cached shares until ``end`` (of ``time.perf_counter``), in turns.

    With each comes what the architecture-level fit of the others in every second place says; None: too few.
    """
    size = parts.pool.block_size
    longest = min(parts.max_model_len, parts.pool.free * size) - 1
    lengths = sorted({round(SHORTEST + (longest - SHORTEST) * n / (LENGTHS - 1)) for n in range(LENGTHS)})
    todo = [(n, int(n * share) // size * size) for n in lengths for share in SHARES if 0 < n <= longest]
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(REPEATS):
        for tokens, cached in dict.fromkeys(todo):
            before = times.get((tokens, cached))
            expected = typical(before) if before else model.prefill_s(tokens, cached)
            if not times or time.perf_counter() + expected < end:
                times.setdefault((tokens, cached), []).append(time_prefill(parts, tokens, cached))
    measured = [(*work, typical(seconds)) for work, seconds in times.items()]
    halves = measured[::2], measured[1::2]
    rows: list[Row] = []
    for place, (tokens, cached, seconds) in enumerate(measured):
        other = halves[1 - place % 2]
        arch = ArchModel.fit(other).prefill_s(tokens, cached) if len(other) >= LENGTHS else None
        rows.append((tokens, cached, seconds, arch))
    return rows


def show(profile: Profile, rows: Sequence[Row]) -> None:
    """A table, and the mean errors of both fits."""
    model = CostModel(profile)
    print(f"\n{'tokens':>7} {'cached':>7} {'measured ms':>12} {'predicted ms':>13} {'error':>7} {'arch level ms':>14}")
    for tokens, cached, seconds, arch in rows:
        predicted = model.prefill_s(tokens, cached)
        shown = "" if arch is None else f"{1e3 * arch:14.1f}"
        error = f"{predicted / seconds - 1:+7.1%}"
        print(f"{tokens:7} {cached:7} {1e3 * seconds:12.1f} {1e3 * predicted:13.1f} {error} {shown}")
    print(f"\n{describe(profile)}")
    own = mean_error([(model.prefill_s(tokens, cached), seconds) for tokens, cached, seconds, _ in rows])
    print(f"mean error over {len(rows)} prefills: operator level {own:.1%}", end="")
    both = [(arch, seconds) for _, _, seconds, arch in rows if arch is not None]
    print(f", architecture level {mean_error(both):.1%}" if both else "; too few for the architecture level")
    if own > WRONG:
        print("this profile foretells badly: give a larger --budget-s, or a machine that does nothing else")


def _nearest_share(row: Row) -> float:
    """Whole blocks are cached: a little less than was asked for."""
    return min(SHARES, key=lambda share: abs(share - row[1] / row[0]))


def draw(profile: Profile, rows: Sequence[Row], path: Path) -> None:
    """Measured points and predicted lines by cached share. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'jmemserve[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = CostModel(profile)
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for number, share in enumerate(SHARES):
        mine = [row for row in rows if _nearest_share(row) == share]
        axis.plot([row[0] for row in mine], [1e3 * row[2] for row in mine], "o", color=f"C{number}", markersize=4)
        most = max(row[0] for row in rows)
        line: list[Any] = list(range(1, most + 1, max(1, most // 400)))
        predicted = [1e3 * model.prefill_s(tokens, int(tokens * share)) for tokens in line]
        axis.plot(line, predicted, color=f"C{number}", linewidth=1, label=f"{share:.0%} cached")
    axis.set(xlabel="tokens of the prompt", ylabel="ms", title=f"{profile.about}: measured (points), predicted (lines)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"wrote {path}; median of measured: {1e3 * statistics.median(row[2] for row in rows):.1f} ms")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
