"""How wrong the router's idea of the caches is, and what that costs: trees fed by responses and by events.

    python benchmarks/staleness.py --trace trace.jsonl.gz --output results/staleness.json --plot results/staleness.png
    python benchmarks/staleness.py                            without a trace: sessions that ask about documents
    python benchmarks/staleness.py --quick                    small sizes: shows that it works, measures nothing

Simulated with the real router, trees and pools. A tree that learns from responses believes that a prefix stays for so
many seconds after it was last used (--ttl), whatever the pool did with it: too long, and it expects blocks that were
dropped (false hits); too short, and it forgets blocks that are there (missed hits). Both are shares of all prompt
tokens. Events tell what the pools do; what remains is what is dropped between routing and the request's turn.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import machine
from policies_parts import documents, simulated
from pool_parts.rows import Aim, Row, print_rows
from tqdm import tqdm

from jmemserve.config import EngineConfig, Policy, PromptTrees, parse_mesh
from jmemserve.scheduler.cost_model import Profile
from jmemserve.simulator import hardware
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.load import Load
from jmemserve.simulator.report import summary
from jmemserve.simulator.traces import read_calls, replay

HERE = Path(__file__).parent


def main() -> None:
    args = _parser().parse_args()
    about = machine.about()
    print(json.dumps(about, indent=2))
    base = EngineConfig(
        kv_cache_tokens=max(args.pool),
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        policy=Policy(args.policy),
    )
    profile = hardware.estimate(hardware.read_model(str(args.model)), args.hardware, 1, base)
    print(f"{args.cluster}: {profile.about}")
    load = _load(args, min(args.pool))
    ways = [(PromptTrees.EVENTS, 0.0), *((PromptTrees.RESPONSES, ttl) for ttl in args.ttl)]
    rows: list[Row] = []
    for pool in args.pool:
        for trees, ttl in tqdm(ways, desc=f"pools of {pool:,} tokens", unit="run"):
            changes = {"kv_cache_tokens": pool, "prompt_trees": trees}
            if ttl:
                changes["prompt_tree_ttl_s"] = ttl
            rows.append(_run(args.cluster, profile, dataclasses.replace(base, **changes), load()))
    print_rows(rows)
    aims = _aims(rows)
    for aim in aims:
        print(aim)
    if args.output:
        args.output.write_text(json.dumps(about | {"hardware": profile.about, "rows": rows}, indent=1) + "\n")
    if args.plot:
        from staleness_parts import plots

        plots.draw(rows, args.plot, f"{args.cluster}, {profile.about}, {about['jmemserve']}")
    if not args.quick and not all(aim.met for aim in aims):
        raise SystemExit("an aim was missed")


def _run(mesh: str, profile: Profile, engine: EngineConfig, load: Load) -> Row:
    specs = parse_mesh(mesh)
    cluster = SimCluster(Setting(specs, {spec.name: profile for spec in specs}, engine))
    cluster.run(load)
    row = summary(cluster)
    events = engine.prompt_trees is PromptTrees.EVENTS
    return {
        "pool_tokens": engine.kv_cache_tokens,
        "trees": engine.prompt_trees.value,
        "ttl_s": None if events else engine.prompt_tree_ttl_s,
        "requests": row["requests"],
        "hit_rate": row["hit_rate"],
        "false_hits": row["false_hits"],
        "missed_hits": row["missed_hits"],
        "ttft_p50_s": row["ttft_p50"],
        "ttft_p99_s": row["ttft_p99"],
        "evictions": row["evictions"],
        "tree_blocks": cluster.tree_blocks,
    }


def _aims(rows: list[Row]) -> list[Aim]:
    """Events are never further from the truth than the best life that was tried, at any size of pool."""
    aims = []
    for pool in dict.fromkeys(row["pool_tokens"] for row in rows):
        wrong = {
            row["ttl_s"]: 100 * (row["false_hits"] + row["missed_hits"]) for row in rows if row["pool_tokens"] == pool
        }
        exact = wrong.pop(None)
        best = min(wrong.values())
        aims.append(Aim(f"pools of {pool:,} tokens: tokens that events mispredict", exact, best, "% of prompts"))
    return aims


def _load(args: argparse.Namespace, longest: int) -> Callable[[], Load]:
    """The same requests for every run."""
    if args.trace is not None:
        calls = read_calls(args.trace)
        return lambda: replay(calls, args.requests, args.speed, args.scale, longest)
    lengths = documents.alike(max(1, args.requests // 12), 1700, 6, 24, 64)
    sessions = documents.copies(lengths, 2, args.rate, 30_000, str(args.seed))
    return lambda: simulated.load(sessions)


def _numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(map(kind, text.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="8xcolocated")
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--pool", type=_numbers(int), default=(32_768, 131_072, 524_288), help="tokens of each")
    parser.add_argument("--ttl", type=_numbers(float), default=(10.0, 60.0, 300.0, 1800.0), help="seconds")
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--model", type=Path, default=HERE / "configs" / "llama-13b")
    parser.add_argument("--trace", type=Path, help="a hash trace in Mooncake's form")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--speed", type=float, default=4.0, help="of the trace's clock")
    parser.add_argument("--scale", type=int, default=4, help="tokens of the trace that become one")
    parser.add_argument("--rate", type=float, default=8.0, help="sessions per second, without a trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action=_Quick, nargs=0, default=False)
    return parser


class _Quick(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, *rest: object) -> None:
        namespace.quick, namespace.requests, namespace.cluster = True, 24, "2xcolocated"
        namespace.pool, namespace.ttl = (16_384,), (5.0,)


if __name__ == "__main__":
    main()
