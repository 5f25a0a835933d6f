"""The global scheduler beside plainer ways to do the same.

    python benchmarks/scheduler.py                                  every part
    python benchmarks/scheduler.py --part tree --blocks 10000,1000000 --instances 64
    python benchmarks/scheduler.py --quick                          small sizes: shows that it works, measures nothing

decision  choosing instances for a request, all in all
relay     tokens that the front-end process hands on, from instances to clients, over gRPC
tree      matching a prompt against what all instances hold, taking in events of their caches, memory

Times are medians over --repeats unless a column says p99.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import machine
from pool_parts.rows import Part

HERE = Path(__file__).parent
PARTS = ("decision", "relay", "tree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="write NAME.json to --results")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--tokens", type=_numbers, default=(4096, 32_768, 131_072), help="of a prompt to be matched")
    parser.add_argument("--instances", type=_numbers, default=(4, 64, 1000))
    parser.add_argument("--blocks", type=_numbers, default=(10_000, 100_000, 1_000_000, 5_000_000), help="of a tree")
    parser.add_argument("--plain-blocks", type=int, default=100_000, help="largest tree that the plain ways get too")
    parser.add_argument("--streams", type=_numbers, default=(32, 128, 256, 512), help="of the relay")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the relay, for each number of streams")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    chosen = tuple(args.part.split(","))
    if not set(chosen) <= set(PARTS):
        parser.error(f"--part takes {', '.join(PARTS)}, not {args.part}")
    if args.repeats < 1 or min(*args.tokens, *args.instances, *args.blocks, args.plain_blocks) < 1:
        parser.error("repeats and sizes must be at least 1")
    if args.quick:
        args.tokens, args.instances, args.blocks, args.repeats = (4096,), (4, 64), (10_000,), 3
        args.streams, args.seconds = (8,), 2.0

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


def runs(args: argparse.Namespace) -> dict[str, Callable[[], Part]]:
    """Every part by name, ready to run."""
    from scheduler_parts import decisions, relay, trees

    sizes = trees.Sizes(args.tokens, args.instances, args.blocks, args.plain_blocks)
    most, count = min(max(args.blocks), 1_000_000), 200 if args.quick else 2000
    return {
        "decision": lambda: decisions.run(args.tokens, args.instances, most, count),
        "relay": lambda: relay.run(args.streams, 0.02, args.seconds),
        "tree": lambda: trees.measure(args.repeats, sizes),
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
