"""Which sizes of tiles suit a Hopper GPU: our attention with some of them, beside what the device can do.

    python benchmarks/tiles.py --output results/tiles-h200.json
    python benchmarks/tiles.py --part decode

The first line of a case is what ``mosaic_gpu.Tiles`` has by itself. What does not fit shared memory or registers is
said, and left out.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import machine
from kernel_parts import cases
from tqdm import tqdm

from jmemserve.kernels.mosaic_gpu import Tiles, attend

HERE = Tiles()
DECODE = [
    HERE,
    *(
        Tiles(decode_span=span, decode_bytes=kilobytes << 10, decode_blocks=blocks)
        for (span, kilobytes), blocks in itertools.product(((64, 64), (64, 96), (64, 128), (128, 128)), (132, 264))
    ),
]
PREFILL = [
    HERE,
    *(Tiles(prefill_span=span, prefill_slots=slots) for span, slots in ((128, 2), (64, 2), (64, 3), (64, 4))),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("decode", "prefill"), help="default: both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    about = machine.about()
    print(json.dumps(about, indent=1))
    setting = cases.Setting.of_device(None, args.repeats, False, "mosaic_gpu")
    if setting.platform != "gpu":
        parser.error("these tiles are for GPUs, of which there is none here")
    peaks = setting.peaks()
    print(f"peak: {peaks.read_s / 1e9:,.1f} GB/s read, {peaks.flop_s / 1e12:,.2f} TFLOP/s in {setting.dtype}\n")
    rows = []
    for part, all_tiles, sizes in (
        ("decode", DECODE, ((1, 32768), (64, 1024), (64, 4096))),
        ("prefill", PREFILL, ((1, 2048), (1, 8192))),
    ):
        if args.part not in (None, part):
            continue
        for heads, (batch, context) in itertools.product(setting.heads[:2], sizes):
            for tiles in tqdm(dict.fromkeys(all_tiles), desc=f"{part} {heads.name} {batch} x {context:,}"):
                kernel = functools.partial(attend, tiles=tiles)
                changed = {name: value for name, value in vars(tiles).items() if name.startswith(part)}
                try:
                    row = cases.attention_row(part, setting, heads, 16, batch, context, "mosaic_gpu", kernel)
                except Exception as error:  # what does not fit is refused by a compiler, in its own words
                    print(f"{changed}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                    continue
                rows.append(row.as_dict(peaks) | changed)
                print(f"{part} {row.case}: {row.seconds * 1e3:8.3f} ms {row.share(peaks):6.1%}  {changed}")
    if args.output:
        args.output.write_text(json.dumps(about | dataclasses.asdict(peaks) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
