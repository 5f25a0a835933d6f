"""Paged attention, moves of blocks and products, beside what the device can do and beside other attention.

    python benchmarks/kernels.py                                   every part, in sizes that fit the device
    python benchmarks/kernels.py --part decode --backends xla,cpu
    python benchmarks/kernels.py --quick                           small sizes: shows that it works, measures nothing
    python benchmarks/kernels.py --output results/kernels-h200.json --plot results/kernels-h200.png

decode    one new token per row: bytes of keys and values over the bandwidth of memory
prefill   one row of new tokens: FLOP of the causal half over the rate of large products
moves     blocks gathered from pages and scattered into them: bytes read and written over the bandwidth
products  weights with columns of tokens (where a backend has its own)

"Of peak" is over what the same device did in the same run: reading a large array for attention, adding one to all of
it in place for moves, the best of some large matrix products in the same type. A kernel runs several times in one
program, each time on the output of the time before, so starting it is not measured. Beside ours: jax.nn's attention on
contiguous keys and values, paged attention of jax's own kernel and of cuDNN where the device has them, PyTorch's
attention where it is installed.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
from kernel_parts import cases
from tqdm import tqdm

PARTS = ("decode", "prefill", "moves", "products")
AIMS = {"decode": 0.8, "prefill": 0.6, "moves": 0.8}  # shares of peak, for the largest sizes on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--backends", help="some of ours, with commas; default: all that can serve")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on CPU float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no other case begins")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    chosen = args.part.split(",")
    if not set(chosen) <= set(PARTS):
        parser.error(f"--part takes {', '.join(PARTS)}, not {args.part}")
    if args.repeats < 1 or args.limit <= 0:
        parser.error("--repeats must be at least 1, and --limit above 0")
    setting = cases.Setting.of_device(args.dtype, args.repeats, args.quick, args.backends)
    about = machine.about()
    print(json.dumps(about, indent=1))
    peaks = setting.peaks()
    read, copy = peaks.read_s / 1e9, peaks.copy_s / 1e9
    print(f"peak: {read:,.1f} GB/s read, {copy:,.1f} copied, {peaks.flop_s / 1e12:,.2f} TFLOP/s in {setting.dtype}\n")
    found = Found()
    begin = time.monotonic()
    for number, part in enumerate(chosen):
        left = args.limit - (time.monotonic() - begin)
        found.measure(part, cases.runs(part, setting), left / (len(chosen) - number))
    rows = found.rows
    print(table(rows, peaks))
    for line in dict.fromkeys(found.skipped):
        print(f"not measured: {line}")
    for line in found.failed:
        print(f"failed: {line}")
    if args.output:
        other = {"dtype": setting.dtype, "skipped": found.skipped, "failed": found.failed}
        kept = [row.as_dict(peaks) for row in rows]
        made = about | dataclasses.asdict(peaks) | other | {"rows": kept}
        args.output.write_text(json.dumps(made, indent=1) + "\n")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    elif args.plot and rows:
        from kernel_parts import plots

        plots.draw(rows, peaks, args.plot, f"{about['device']}, jax {about['jax']}, {setting.dtype}")
    if found.failed:
        raise SystemExit(f"{len(found.failed)} of ours failed")


@dataclasses.dataclass
class Found:
    """What was measured, what could not be, and what should have been."""

    rows: list[cases.Row] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    def measure(self, part: str, runs: Iterator[tuple[str, Callable[[], cases.Row]]], limit_s: float) -> None:
        """All of a part that can begin within ``limit_s``."""
        end, todo = time.monotonic() + limit_s, list(runs)
        for number, (name, run) in enumerate(tqdm(todo, desc=part, unit="case")):
            if time.monotonic() > end:
                self.skipped.append(f"{part}: no time was left for the last {len(todo) - number} of {len(todo)} cases")
                return
            try:
                self.rows.append(run())
            except cases.Skipped as reason:
                self.skipped.append(f"{part}: {reason}")
            except Exception as error:  # on a device that nobody has tried; the other cases are not to be lost
                first = (str(error).splitlines() or [""])[0][:200]
                self.failed.append(f"{part}: {name}: {type(error).__name__}: {first}")


def table(rows: list[cases.Row], peaks: cases.Peaks) -> str:
    """A line per measurement."""
    width = max([len(row.case) for row in rows], default=4)
    lines = [f"{'part':9} {'case':{width}} {'by':14} {'time':>10} {'rate':>16} {'of peak':>8}"]
    for row in rows:
        unit = "GB/s" if row.bytes else "GFLOP/s"
        rate = (row.bytes or row.flop) / row.seconds / 1e9
        seconds = f"{row.seconds * 1e3:.3f} ms"
        share = row.share(peaks)
        lines.append(f"{row.part:9} {row.case:{width}} {row.by:14} {seconds:>10} {rate:10,.1f} {unit:7} {share:6.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
