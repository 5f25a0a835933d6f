"""The memory pool beside the machine's limits and the paper's figures.

    python benchmarks/pool.py                                 every part
    python benchmarks/pool.py --part api,index --repeats 9
    python benchmarks/pool.py --quick                         small sizes: shows that it works, measures nothing

api       alloc, free, insert and match in microseconds (paper 7.5.1)
index     the radix tree beside indices of hashes (paper 7.5.2)
blocks    a prompt's keys and values sent as large blocks and as small ones (paper 7.5.3)
transfer  GB/s between two pools by every transport and medium, beside a memory copy and a bare socket
swap      GB/s between HBM and DRAM of one pool
memory    bytes that the index needs per cached block
layout    the engine's prefill and decode with its pages in either layout

Times are medians. "Paper" columns are the paper's own figures, from its machines (A100s, NCCL), not from this one.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import machine
from pool_parts.rows import Part

from jmemserve.devices import arrange_cpu_devices

HERE = Path(__file__).parent
PARTS = ("api", "index", "blocks", "transfer", "swap", "memory", "layout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="write NAME.json and NAME.png to --results")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--transports", default="local,staged-shm,staged-tcp,jax", help="of blocks and transfer")
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-125m", help="whose blocks are sent")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of these blocks")
    parser.add_argument("--compilation-cache-dir", help="keep the engine's compiled steps here between runs")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    chosen = tuple(args.part.split(","))
    if not set(chosen) <= set(PARTS):
        parser.error(f"--part takes {', '.join(PARTS)}, not {args.part}")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")

    arrange_cpu_devices(2)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share one accelerator
    about = machine.about()
    print(json.dumps(about, indent=2))
    results: dict[str, Part] = {}
    for name, run in runs(args).items():
        if name in chosen:
            results[name] = run()
            if args.quick:
                results[name].aims.clear()  # they are for the full sizes
            results[name].show(name)
            if args.output:  # after every part: a long run that is ended keeps what it has
                args.results.mkdir(parents=True, exist_ok=True)
                plain = about | {"repeats": args.repeats, "parts": {n: part.plain() for n, part in results.items()}}
                (args.results / f"{args.output}.json").write_text(json.dumps(plain, indent=1) + "\n")
    aims = [aim for part in results.values() for aim in part.aims]
    print(f"\n{sum(aim.met for aim in aims)} of {len(aims)} aims met")
    if args.output:
        from pool_parts import plots  # needs matplotlib, which a run without output does not

        tables = {name: part.tables for name, part in results.items()}
        title = f"{about['cpu']}, {about['device']}, {about['jmemserve']}"
        plots.draw(tables, args.results / f"{args.output}.png", title)


def runs(args: argparse.Namespace) -> dict[str, Callable[[], Part]]:
    """Every part by name, ready to run."""
    from pool_parts import api, blocks, index, layout, memory, swap, transfer, worlds

    from jmemserve.kernels.pages import PageLayout

    text = json.loads((args.config / "config.json").read_text())
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    real = PageLayout(text["num_hidden_layers"], text["num_key_value_heads"], api.BLOCK, head_dim, args.dtype)
    names = tuple(args.transports.split(","))
    if not set(names) <= set(worlds.WAYS):
        raise SystemExit(f"--transports takes {', '.join(worlds.WAYS)}, not {args.transports}")
    ways, repeats, quick = worlds.Ways(), args.repeats, args.quick
    return {
        "api": lambda: api.measure(repeats, quick),
        "index": lambda: index.measure(repeats, quick),
        "blocks": lambda: blocks.measure(repeats, quick, ways, names, real),
        "transfer": lambda: transfer.measure(repeats, quick, ways, names, real),
        "swap": lambda: swap.measure(repeats, quick, real),
        "memory": lambda: memory.measure(repeats, quick),
        "layout": lambda: layout.measure(repeats, quick, str(args.config), args.compilation_cache_dir),
    }


if __name__ == "__main__":
    main()
