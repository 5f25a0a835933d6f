"""Routing policies on questions about documents, as the paper's figure 15 compares them.

    python benchmarks/policies.py                                    3 prefill and 1 decode instance here, and simulated
    python benchmarks/policies.py --part simulated --sessions 80 --cluster 24xprefill+8xdecode
    python benchmarks/policies.py --data FILE                         lengths of recorded documents and questions
    python benchmarks/policies.py --quick                             small sizes: shows that it works, measures nothing
    python benchmarks/policies.py --output results/policies-cpu.json --plot results/policies-cpu.png

Each prompt is a document and a question; a session asks several about its document, one after the other. With share
ratio r each session comes r times. TTFT is what the client sees; hit rate is the share of prompt tokens found cached;
imbalance is the work of the busiest prefill instance over the mean (1: all have the same).

"Paper" columns are figure 15's own figures, from its machines: the order and the ratios are to be compared, no more.
"""

import argparse
import json
import tempfile
from pathlib import Path

import machine
from policies_parts import documents
from policies_parts.rows import Row, row
from pool_parts.rows import print_rows
from tqdm import tqdm

from jmemserve.server.flags import default_cache_dir

HERE = Path(__file__).parent
POLICIES = ("round_robin", "least_load", "session", "longest_prefix", "cost")
PAPER = {  # figure 15: TTFT in ms, (policy, ratio) -> (P50, P99)
    ("round_robin", 2): (93.9, 317),
    ("longest_prefix", 2): (42.6, 116),
    ("session", 2): (44.7, 126),
    ("round_robin", 3): (128.9, 316),
    ("longest_prefix", 3): (41.1, 87.3),
    ("session", 3): (51.0, 213),
}


def main() -> None:
    args = _parser().parse_args()
    about = machine.about()
    print(json.dumps(about, indent=2))
    if args.data is not None:
        lengths = documents.recorded(args.data, args.sessions, args.questions, args.divide, args.document)
    else:
        lengths = documents.alike(
            args.sessions, args.document // args.divide, args.questions, args.question, args.answer
        )
    rows: list[Row] = []
    if "real" in args.part:
        rows += _real(args, lengths)
    if "simulated" in args.part:
        rows += _simulated(args)
    for one in rows:
        paper = PAPER.get((str(one["policy"]), int(one["ratio"])))
        one |= {"paper_p50_ms": paper[0], "paper_p99_ms": paper[1]} if paper else {}
    print_rows(rows)
    if args.output:
        args.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if args.plot:
        from policies_parts import plots

        plots.draw(rows, args.plot, f"{about['cpu']}, {about['device']}, {about['jmemserve']}")


def _real(args: argparse.Namespace, lengths: list[documents.Lengths]) -> list[Row]:
    """Every policy on a server of its own; the same sessions at the same times."""
    from policies_parts import real

    flags = {
        "model": str(args.config),
        "load-format": "dummy",
        "dtype": "float32",
        "max-model-len": "1024",
        "kv-cache-tokens": str(args.kv_tokens),
        "compilation-cache-dir": args.compilation_cache_dir,
    }
    rows, bar = [], tqdm(total=len(args.policies) * len(args.ratios), unit="run")
    with tempfile.TemporaryDirectory() as folder:
        for policy in args.policies:
            bar.set_description(f"{policy} starts")
            with real.serve(policy, args.mesh, flags, Path(folder) / f"{policy}.log") as server:
                server.play(documents.copies(lengths[:2], 1, 10.0, server.vocab_size, "warm"))
                for ratio in args.ratios:
                    bar.set_description(f"{policy}, ratio {ratio}")
                    sessions = documents.copies(lengths, ratio, args.rate, server.vocab_size, f"{args.seed} {ratio}")
                    before = server.computed()
                    asked = server.play(sessions)
                    computed = {name: count - before[name] for name, count in server.computed().items()}
                    rows.append(row(f"real {args.mesh}", policy, ratio, asked, computed))
                    bar.update(1)
    bar.close()
    return sorted(rows, key=lambda one: one["ratio"])


def _simulated(args: argparse.Namespace) -> list[Row]:
    """Larger documents on larger clusters, with the costs of a published accelerator."""
    from policies_parts import simulated

    from jmemserve.config import EngineConfig
    from jmemserve.simulator import hardware

    engine = EngineConfig(kv_cache_tokens=131_072, max_num_seqs=64, max_num_batched_tokens=2048)
    model = hardware.read_model(str(args.simulated_model))
    profile = hardware.estimate(model, args.hardware, 1, engine)
    lengths = documents.alike(args.simulated_sessions, 1700, 6, 24, 27)
    rows = []
    for mesh in args.cluster:
        scale = mesh_size(mesh) / 4
        many = lengths * round(scale)
        for ratio in tqdm(args.ratios, desc=f"simulated {mesh}"):
            sessions = documents.copies(many, ratio, args.simulated_rate * scale, 30_000, f"{args.seed} {ratio}")
            rows += [simulated.play(mesh, policy, profile, engine, sessions, ratio) for policy in args.policies]
    return rows


def mesh_size(mesh: str) -> int:
    """Instances of a mesh."""
    from jmemserve.config import parse_mesh

    return len(parse_mesh(mesh))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="real,simulated", help="one of them, or both")
    parser.add_argument("--policies", type=lambda text: tuple(text.split(",")), default=POLICIES)
    parser.add_argument("--ratios", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2, 3, 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action=_Quick, nargs=0, default=False)
    real = parser.add_argument_group("real instances")
    real.add_argument("--mesh", default="3xprefill+decode")
    real.add_argument("--config", type=Path, default=HERE / "configs" / "llama-28m")
    real.add_argument("--kv-tokens", type=int, default=16_384, help="of each instance")
    real.add_argument("--sessions", type=int, default=16)
    real.add_argument("--questions", type=int, default=3)
    real.add_argument("--document", type=int, default=1700, help="tokens, before --divide")
    real.add_argument("--question", type=int, default=16)
    real.add_argument("--answer", type=int, default=8)
    real.add_argument("--divide", type=int, default=4, help="lengths by this: a small machine")
    real.add_argument("--rate", type=float, default=1.0, help="sessions that begin per second")
    real.add_argument("--data", type=Path, help="JSON lines with doc and qa")
    real.add_argument("--compilation-cache-dir", default=default_cache_dir())
    simulated = parser.add_argument_group("simulated instances")
    simulated.add_argument("--cluster", nargs="*", default=("3xprefill+decode", "24xprefill+8xdecode"))
    simulated.add_argument("--hardware", default="h200")
    simulated.add_argument("--simulated-model", type=Path, default=HERE / "configs" / "llama-13b")
    simulated.add_argument("--simulated-sessions", type=int, default=80, help="of 6 questions, per 4 instances")
    simulated.add_argument("--simulated-rate", type=float, default=8.0, help="sessions per second, per 4 instances")
    return parser


class _Quick(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, *rest: object) -> None:
        namespace.sessions, namespace.ratios, namespace.policies = 2, (2,), ("round_robin", "cost")
        namespace.rate, namespace.simulated_sessions, namespace.cluster = 10.0, 4, ("3xprefill+decode",)


if __name__ == "__main__":
    main()
