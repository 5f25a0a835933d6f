"""The simulator beside the real system: the same requests at the same times, on instances of this machine.

    python benchmarks/simulate.py --output results/simulate-cpu.json --plot results/simulate-cpu.png
    python benchmarks/simulate.py --mesh prefill+decode --requests 20 --rate 0.5
    python benchmarks/simulate.py --again results/simulate-cpu.json      simulate again what was measured there
    python benchmarks/simulate.py --quick                  small sizes: shows that it works, measures nothing

Each arrangement serves Poisson arrivals, really (a server process, asked over gRPC) and on virtual time. What steps and
transfers usually take is what the instances themselves have learnt while other requests warmed them up, as the
client's ``--profile`` shows it. A few requests, one after the other, show what the front-end and gRPC add to a first
token. Instances of one machine share its cores: two that calibrate at the same time show how many can work at full
speed, and the simulator is told. The aim is that the medians of TTFT and JCT agree within 15 %.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from policies_parts import real
from policies_parts.documents import Session
from policies_parts.rows import Asked
from pool_parts.rows import Aim, Row, print_rows
from tqdm import tqdm

from jmemserve.config import EngineConfig, parse_mesh
from jmemserve.scheduler.cost_model import Profile
from jmemserve.server.flags import default_cache_dir
from jmemserve.server.messages import Finished
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.load import Load, poisson
from jmemserve.types import SamplingParams

HERE = Path(__file__).parent
AIM = 15.0  # percent


def main() -> None:
    args = _parser().parse_args()
    about = machine.about()
    print(json.dumps(about, indent=2))
    found = json.loads(args.again.read_text()) if args.again else measure(args) | about
    rows: list[Row] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for run in found["runs"]:
        measured = [Asked(*one) for one in run["asked"]]
        simulated = simulate(args, run, found["full_speed"], found["front_end_s"])
        rows += [compare(run["mesh"], figure, measured, simulated) for figure in ("ttft_ms", "tpot_ms", "jct_ms")]
        curves[run["mesh"]] = {
            f"{how} {figure[:4].upper()}": sorted(figures(asked)[figure])
            for figure in ("ttft_ms", "jct_ms")
            for how, asked in (("measured", measured), ("simulated", simulated))
        }
    print_rows(rows)
    aims = [
        Aim(f"{row['mesh']}: medians of {row['figure']} differ by", abs(float(row["error_percent"])), AIM, "%")
        for row in rows
        if row["figure"] != "tpot_ms"
    ]
    for aim in aims:
        print(aim)
    if args.output:
        args.output.write_text(json.dumps(found | {"simulated_by": about["jmemserve"], "rows": rows}, indent=1) + "\n")
    if args.plot:
        from simulate_parts import plots

        plots.draw(curves, args.plot, f"{found['cpu']}, {found['cores']} cores, {about['jmemserve']}")
    if not args.quick and not all(aim.met for aim in aims):
        raise SystemExit("an aim was missed")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that comes from the machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed, front_end_s = full_speed(args, folder), overhead(args, folder)
        print(f"{speed:.2f} instances of this machine can work at full speed")
        print(f"the front-end and gRPC add {1e3 * front_end_s:.1f} ms to a first token")
        runs = []
        for mesh in tqdm(args.mesh, unit="arrangement"):
            measured, profiles = serve(args, mesh, folder)
            asked = [dataclasses.astuple(one) for one in measured]
            runs.append({"mesh": mesh, "profiles": profiles, "asked": asked})
    return {"full_speed": speed, "front_end_s": front_end_s, "runs": runs}


def full_speed(args: argparse.Namespace, folder: Path) -> float:
    """How many instances work at full speed when two do: one measures alone, then two at the same time."""
    [alone], together = calibrate(args, folder, 1), calibrate(args, folder, 2)
    slower = [
        other / one for profile in together for (*_, one), (*_, other) in zip(alone.steps, profile.steps, strict=True)
    ]
    return len(together) / max(1.0, median(slower))


def calibrate(args: argparse.Namespace, folder: Path, count: int) -> list[Profile]:
    """So many processes measure at the same time."""
    paths = [folder / f"profile{count}.{number}.json" for number in range(count)]
    command = [sys.executable, "-m", "jmemserve.calibrate", "--budget-s", str(2 * args.budget_s)]
    flags = [t for name, value in _flags(args).items() if name != "calibrate-s" for t in (f"--{name}", value)]
    running = [
        subprocess.Popen([*command, *flags, "--output", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for path in paths
    ]
    for process in running:
        out, _ = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(out.decode()[-2000:])
    return [Profile.from_json(path.read_text()) for path in paths]


def serve(args: argparse.Namespace, mesh: str, folder: Path) -> tuple[list[Asked], dict[str, str]]:
    """What the clients of a real server see, and what its instances had learnt of their costs before."""
    with real.serve("cost", mesh, _flags(args), folder / "server.log") as server:
        server.play(_sessions(_load(args, args.seed + 1), server.vocab_size))
        profiles = {member.name: member.profile for member in server.client.cluster().members}
        return server.play(_sessions(_load(args), server.vocab_size)), profiles


def overhead(args: argparse.Namespace, folder: Path) -> float:
    """Seconds of a first token that are not the instance's."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    found: list[float] = []
    with real.serve("cost", "colocated", _flags(args), folder / "overhead.log") as server:
        for prompt in ([10 + number] * 32 for number in range(20)):
            sent, first = time.perf_counter(), 0.0
            for message in server.client.stream(prompt, params, timeout_s=60):
                if isinstance(message, Finished):
                    found.append(first - message.timings.first_token_s)
                else:
                    first = first or time.perf_counter() - sent
    return median(found)


def simulate(args: argparse.Namespace, run: dict[str, Any], speed: float, front_end_s: float) -> list[Asked]:
    """The same on virtual time."""
    profiles = {name: Profile.from_json(text) for name, text in run["profiles"].items()}
    engine = EngineConfig(kv_cache_tokens=args.kv_tokens)
    cluster = SimCluster(Setting(parse_mesh(run["mesh"]), profiles, engine, cores=speed, front_end_s=front_end_s))
    cluster.run(_load(args))
    cluster.check()
    return [Asked(o.prompt, o.cached, o.ttft, o.jct, o.tokens) for o in cluster.outcomes]


def compare(mesh: str, figure: str, measured: list[Asked], simulated: list[Asked]) -> Row:
    """Medians of one figure, and P90 beside them."""
    real_, virtual = (np.percentile(figures(asked)[figure], (50, 90)) for asked in (measured, simulated))
    return {
        "mesh": mesh,
        "figure": figure,
        "requests": len(measured),
        "measured_p50": float(real_[0]),
        "simulated_p50": float(virtual[0]),
        "error_percent": 100 * float(virtual[0] / real_[0] - 1),
        "measured_p90": float(real_[1]),
        "simulated_p90": float(virtual[1]),
    }


def figures(asked: list[Asked]) -> dict[str, list[float]]:
    """Of every request, in milliseconds."""
    return {
        "ttft_ms": [1e3 * one.first_s for one in asked],
        "tpot_ms": [1e3 * (one.last_s - one.first_s) / max(1, one.tokens - 1) for one in asked],
        "jct_ms": [1e3 * one.last_s for one in asked],
    }


def _load(args: argparse.Namespace, seed: int | None = None) -> Load:
    how = args.requests, args.rate, args.prompt, args.output_tokens, args.shared
    return poisson(*how, args.seed if seed is None else seed)


def _sessions(load: Load, vocabulary: int) -> list[Session]:
    """The same prompts in the words of the model."""
    low = 3
    return [
        Session(job.session, at, ((tuple(low + word % (vocabulary - low) for word in job.prompt()), job.output),))
        for at, job in load
    ]


def _flags(args: argparse.Namespace) -> dict[str, str]:
    return {
        "model": str(args.config),
        "load-format": "dummy",
        "dtype": "float32",
        "max-model-len": "1024",
        "kv-cache-tokens": str(args.kv_tokens),
        "calibrate-s": str(args.budget_s),
        "compilation-cache-dir": args.compilation_cache_dir,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="*", default=("prefill+decode", "2xcolocated", "2xprefill+decode"))
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-28m")
    parser.add_argument("--kv-tokens", type=int, default=16_384, help="of each instance")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1.2, help="requests per second")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--shared", type=int, default=64, help="tokens that all prompts begin with")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--budget-s", type=float, default=8.0, help="to calibrate each instance before it serves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compilation-cache-dir", default=default_cache_dir())
    parser.add_argument("--again", type=Path, help="what --output wrote, with the same sizes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action=_Quick, nargs=0, default=False)
    return parser


class _Quick(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, *rest: object) -> None:
        namespace.quick, namespace.requests, namespace.rate, namespace.budget_s = True, 4, 4.0, 2.0
        namespace.prompt, namespace.shared, namespace.output_tokens = 40, 16, 4


if __name__ == "__main__":
    main()
