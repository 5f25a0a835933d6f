"""Plan a cluster without having it: the real schedulers on virtual time, with modelled instances.

    python -m jmemserve.simulate --profile profile.json --cluster prefill+decode --rate 4 --prompt 512
    python -m jmemserve.simulate --hardware h200 --model config.json --trace calls.jsonl.gz --cluster 4xprefill+2xdecode
    python -m jmemserve.simulate ... --policy cost,round_robin --caching none,prefill,delta,full --plot compared.png
    python -m jmemserve.simulate ... --sweep 64 --ttft-p99 2 --tpot-p99 0.05

A load is a hash trace in Mooncake's form, a file of sessions, or Poisson arrivals of random prompts. Times are those
of a profile, which ``python -m jmemserve.calibrate`` measures; with ``--hardware`` they are worked out from published
peaks, which is a rough guide and is marked as such.
"""

import argparse
import dataclasses
import enum
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jmemserve.config import Bypass, Caching, EngineConfig, InstanceSpec, Policy, PromptTrees, SwapPolicy, parse_mesh
from jmemserve.errors import ConfigError, JmemserveError
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.simulator import hardware
from jmemserve.simulator.cluster import Setting, SimCluster
from jmemserve.simulator.load import Load, poisson
from jmemserve.simulator.plots import draw
from jmemserve.simulator.report import Row, plain, summary, table
from jmemserve.simulator.sessions import converse, read_sessions
from jmemserve.simulator.sweep import Goal, cheapest, demand
from jmemserve.simulator.traces import is_hash_trace, read_calls, replay

KV_TOKENS = 65_536
PICTURES = (".png", ".pdf", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the flags ask for; the process's exit status."""
    args = _parser().parse_args(arguments)
    try:
        _check_files(args)
        rows = _search(args) if args.sweep else _compare(args)
        print(table(rows))
        if args.sweep:
            print(f"\nthe cheapest that meets the goal: {rows[-1]['mesh']}, {rows[-1]['devices']} devices")
        if args.output:
            Path(args.output).write_text(json.dumps(plain(rows), indent=1, allow_nan=False) + "\n")
        if args.plot:
            draw(rows, Path(args.plot), " ".join(arguments if arguments is not None else sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return 130
    except JmemserveError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"simulate: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Before anything is run: can what comes out be written?"""
    for name in ("output", "plot"):
        path = Path(getattr(args, name) or "x")
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--{name} {path} cannot be written: it is a folder, or lies in none")
    if args.plot and Path(args.plot).suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {args.plot}: a picture ends in {', '.join(PICTURES)}")


def _compare(args: argparse.Namespace) -> list[Row]:
    """A run for every cluster, policy and milestone."""
    choices = itertools.product(args.cluster, _names(args.policy, Policy), _names(args.caching, Caching))
    return [_run(args, mesh, policy, caching) for mesh, policy, caching in choices]


def _search(args: argparse.Namespace) -> list[Row]:
    """The runs of a sweep, the cheapest that meets the goal last."""
    goal = Goal(args.ttft_p99, args.tpot_p99)
    if goal == Goal():
        raise ConfigError("--sweep needs a goal: --ttft-p99, --tpot-p99 or both, in seconds")
    policy, caching = _names(args.policy, Policy)[0], _names(args.caching, Caching)[0]
    spec = parse_mesh(f"colocated:{args.devices}")[0]
    costs = CostModel(_profile(args, spec, _engine(args, (spec,), policy, caching)))
    rows, best = [], None
    for row, met in cheapest(
        lambda mesh: _run(args, mesh, policy, caching), goal, args.sweep, args.devices, demand(_load(args, None), costs)
    ):
        rows.append(row | {"meets_goal": met})
        if met and (best is None or row["devices"] < best["devices"]):
            best = rows[-1]
    assert best is not None, "cheapest ends with one, or raises"
    return [row for row in rows if row is not best] + [best]


def _run(args: argparse.Namespace, mesh: str, policy: Policy, caching: Caching) -> Row:
    specs = parse_mesh(mesh)
    engine = _engine(args, specs, policy, caching)
    profiles = {spec.name: _profile(args, spec, engine) for spec in specs}
    for about in dict.fromkeys(profile.about for profile in profiles.values() if profile.about):
        tqdm.write(f"{mesh}: {about}", file=sys.stderr)
    began = time.monotonic()
    with tqdm(total=args.requests, desc=f"{mesh} {policy.value} {caching.value}", unit=" req", file=sys.stderr) as bar:
        cluster = SimCluster(
            Setting(specs, profiles, engine, args.dram_tokens, args.cores, args.front_end_s), bar.update
        )
        cluster.run(_load(args, engine.kv_cache_tokens))
        unsent = args.requests - len(cluster.outcomes)
        bar.update(unsent)
    row = (
        summary(cluster)
        | {"unsent": unsent}
        | {"wall_s": time.monotonic() - began, "profile": next(iter(profiles.values())).about}
    )
    if args.hardware:
        row["moved_bytes"] = row["moved_blocks"] * engine.block_size * hardware.read_model(args.model).kv_bytes
    return row


def _engine(args: argparse.Namespace, specs: Sequence[InstanceSpec], policy: Policy, caching: Caching) -> EngineConfig:
    tokens = args.kv_tokens
    if tokens is None and args.hardware:
        model = hardware.read_model(args.model)
        tokens = min(hardware.room(model, args.hardware, spec.model_axis) for spec in specs)
    return EngineConfig(
        block_size=args.block_size,
        kv_cache_tokens=tokens or KV_TOKENS,
        swap=SwapPolicy(args.swap),
        caching=caching,
        bypass=Bypass(args.bypass),
        policy=policy,
        prompt_trees=PromptTrees(args.prompt_trees),
        prompt_tree_ttl_s=args.prompt_tree_ttl_s,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_queue=args.max_queue,
    )


def _profile(args: argparse.Namespace, spec: InstanceSpec, engine: EngineConfig) -> Profile:
    """Of one instance: from a file for its role or for all, or worked out."""
    if bool(args.profile) == bool(args.hardware):
        raise ConfigError(
            "give --profile FILE (for each role, if they differ: --profile decode=FILE) or --hardware NAME"
        )
    if args.hardware:
        return hardware.estimate(hardware.read_model(args.model), args.hardware, spec.model_axis, engine)
    files = dict(_role_and_file(text) for text in args.profile)
    path = files.get(spec.role.value, files.get(""))
    if path is None:
        raise ConfigError(
            f"there is no --profile for {spec.role.value} instances: add --profile {spec.role.value}=FILE"
        )
    try:
        profile = Profile.from_json(Path(path).read_text())
        if args.dram_tokens and not profile.swap_call_s and not profile.swap_block_s:
            raise ConfigError("it does not say what swapping costs: calibrate with --host-memory-gb, for --dram-tokens")
        return profile
    except UnicodeDecodeError:
        raise ConfigError(f"--profile {path} is not text") from None
    except OSError as error:
        raise ConfigError(f"--profile {path}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"--profile {path}: {error}") from None


def _role_and_file(text: str) -> tuple[str, str]:
    role, equals, path = text.partition("=")
    return (role, path) if equals and role in ("prefill", "decode", "colocated") else ("", text)


def _load(args: argparse.Namespace, longest: int | None) -> Load:
    longest = longest or 1 << 30
    if not args.trace:
        return poisson(args.requests, args.rate, args.prompt, args.output_tokens, args.shared_prefix, args.seed)
    path = Path(args.trace)
    if is_hash_trace(path):
        return replay(read_calls(path), args.requests, args.speed, args.scale, longest)
    return converse(read_sessions(path), args.requests, args.rate, args.think_s, args.seed, args.scale, longest)


def _at_least(kind: type, low: float = 0, above: bool = True) -> Callable[[str], Any]:
    """What a flag's text means; nothing that is infinite or no number, and nothing too small."""

    def check(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of this kind") from None
        if not math.isfinite(value) or value < low or above and value <= low:
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low:g}, not {text}")
        return value

    return check


def _names[E: (Policy, Caching)](text: str, kind: type[E]) -> list[E]:
    """Values of an enumeration, by name."""
    try:
        return [kind(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{error}; possible are {', '.join(value.value for value in kind)}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jmemserve.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}

    def group(title: str, *flags: tuple[str, dict]) -> None:
        part = parser.add_argument_group(title)
        for name, how in flags:
            part.add_argument(name, **how)

    def number(kind: type, default: object, about: str) -> dict:
        """Of a flag that is above 0, unless its default is 0."""
        check = _at_least(kind, 0, above=default != 0)
        return {"type": check, "default": default, "metavar": "N", "help": f"{about} (default: {default})"}

    def choice(kind: type[enum.Enum], default: str, about: str) -> dict:
        return {"choices": [value.value for value in kind], "default": default, "help": f"{about} (default: {default})"}

    names = {"metavar": "NAME[,NAME]"}
    group(
        "the cluster",
        (
            "--cluster",
            {"nargs": "+", "default": ["colocated"], "metavar": "MESH", "help": "as of --mesh, some to compare"},
        ),
        ("--profile", {"action": "append", "metavar": "[ROLE=]FILE", "help": "what work costs, measured"}),
        ("--hardware", {"metavar": "NAME", "help": f"or worked out for a device: {', '.join(hardware.DEVICES)}"}),
        ("--model", {"default": "demo", "metavar": "PATH", "help": "config.json of the model, with --hardware"}),
        (
            "--kv-tokens",
            {"type": _at_least(int), "metavar": "N", "help": f"of each pool (default: what fits, or {KV_TOKENS})"},
        ),
        ("--dram-tokens", number(int, 0, "of each pool in host memory")),
        ("--block-size", number(int, defaults["block_size"], "tokens per block")),
        ("--max-num-seqs", number(int, defaults["max_num_seqs"], "sequences in one step")),
        ("--max-num-batched-tokens", number(int, defaults["max_num_batched_tokens"], "new tokens in one step")),
        ("--max-queue", number(int, defaults["max_queue"], "requests waiting before new ones are refused")),
        ("--policy", names | {"default": "cost", "help": "routing policies to compare"}),
        ("--caching", names | {"default": "full", "help": "milestones to compare"}),
        ("--bypass", choice(Bypass, "off", "short prompts may be prefilled where they are decoded")),
        ("--swap", choice(SwapPolicy, "auto", "when DRAM is used")),
        ("--prompt-trees", choice(PromptTrees, "events", "what the router's trees learn from")),
        ("--prompt-tree-ttl-s", number(float, defaults["prompt_tree_ttl_s"], "with responses: life of an entry")),
        ("--front-end-s", number(float, 0.0, "seconds of a request in the front-end and on the wire")),
        (
            "--cores",
            {
                "type": _at_least(float),
                "metavar": "N",
                "help": "instances share so many cores (default: each has its own)",
            },
        ),
    )
    group(
        "the load",
        ("--trace", {"metavar": "FILE", "help": "a hash trace or a file of sessions, .jsonl or .jsonl.gz"}),
        ("--requests", number(int, 1000, "how many; a trace is repeated with fresh ids")),
        ("--speed", number(float, 1.0, "of a hash trace's clock")),
        ("--scale", number(int, 1, "tokens of a file that become one")),
        ("--rate", number(float, 1.0, "requests per second, of sessions and Poisson arrivals")),
        ("--think-s", number(float, 0.0, "mean pause before a session's next turn")),
        ("--prompt", number(int, 512, "tokens of a Poisson prompt")),
        ("--output-tokens", number(int, 64, "tokens of its answer")),
        ("--shared-prefix", number(int, 0, "tokens that all Poisson prompts begin with")),
        ("--seed", number(int, 0, "of arrivals and pauses")),
    )
    group(
        "the search",
        (
            "--sweep",
            {
                "type": _at_least(int),
                "metavar": "N",
                "help": "find the fewest of at most N instances that meet the goal",
            },
        ),
        ("--ttft-p99", {"type": _at_least(float), "metavar": "S", "help": "the goal: seconds to the first token"}),
        ("--tpot-p99", {"type": _at_least(float), "metavar": "S", "help": "and seconds per token after it"}),
        ("--devices", number(int, 1, "of each instance in a sweep")),
    )
    group(
        "the report",
        ("--output", {"metavar": "FILE", "help": "every figure, as JSON"}),
        ("--plot", {"metavar": "FILE", "help": "a picture, as PNG"}),
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
