"""How well a prefill's time is foretold, at the operator level and at the architecture level (paper 7.5.6, figure 14).

    python benchmarks/cost_model.py --output results/cost-model-cpu.json --plot results/cost-model-cpu.png
    python benchmarks/cost_model.py --config configs/llama-125m --longest 2048 --lengths 8
    python benchmarks/cost_model.py --quick                  small sizes: shows that it works, measures nothing

An instance with one device and one with two are started one after the other. Each fits its operator-level model at
warm-up, from single steps (``--calibrate-s``), and then predicts whole prompts, from their arrival to the first token,
that it has never seen: lengths from 62 tokens up, 0, 25, 50 and 75 % of them cached.

op           that prediction
op, scaled   at more devices: the constants of one device, times what a single step says (the paper's way)
arch         a polynomial in length and cached share, fitted to all measurements of one device; at more devices divided
             by their number, as in the paper
arch, refit  the same, fitted to all measurements of the very instance: what it predicts it has seen
"""

import argparse
import json
from pathlib import Path
from typing import Any

import machine
from engine_parts.driver import Driver
from tqdm import tqdm

from jmemserve.config import EngineConfig, LoadFormat
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.single import instances
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.fitting import ArchModel, mean_error, typical

HERE = Path(__file__).parent
SHORTEST = 62
SHARES = (0, 25, 50, 75)  # percent cached
AIM = 0.05
# Figure 14 b: mean error at two devices in percent, by percent cached.
PAPER = {"op": {0: 4.9, 25: 4.7, 50: 4.9}, "arch": {0: 18.0, 25: 20.1, 50: 18.5}}
KINDS = ("op", "op, scaled", "arch", "arch, refit")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "llama-28m"), help="a folder with a config.json")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="of each instance; the first is 1")
    parser.add_argument("--lengths", type=int, default=16, help="how many lengths")
    parser.add_argument("--longest", type=int, default=4000, help="tokens of the longest prompt")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calibrate-s", type=float, default=10.0, help="seconds of each instance to fit its model")
    parser.add_argument("--compilation-cache-dir", help="keep compiled steps here between runs")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--plot", type=Path, help="draw them there")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.longest, args.repeats, args.calibrate_s = 4, 400, 1, 1.0
    if args.devices[0] != 1 or args.lengths < 2 or args.longest <= SHORTEST or args.repeats < 1:
        parser.error("--devices begins with 1, --lengths is 2 or more, --longest above 62, --repeats 1 or more")

    arrange_cpu_devices(max(args.devices))
    about = machine.about()
    print(json.dumps(about, indent=2))
    rows: list[Row] = []
    profiles: dict[int, Profile] = {}
    for devices in args.devices:
        profiles[devices], measured = measure(args, devices)
        rows += measured
    predict(rows, profiles)
    errors = mean_errors(rows, args.devices)
    show(rows, errors)
    verdicts = judge(errors, args.devices)
    for sentence, met in verdicts:
        print(f"{'met    ' if met else 'NOT MET'} {sentence}")
    if args.output is not None:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        result = about | {"arguments": plain, "rows": rows, "errors": errors}
        result["profiles"] = {str(devices): json.loads(profile.to_json()) for devices, profile in profiles.items()}
        result["verdicts"] = [{"what": sentence, "met": met} for sentence, met in verdicts]
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        draw(rows, errors, args.plot, f"{about['cpu']}, {Path(args.config).name}, {about['jmemserve']}")


def measure(args: argparse.Namespace, devices: int) -> tuple[Profile, list[Row]]:
    """The profile of an instance, as fitted at its warm-up, and what its prompts took."""
    engine = EngineConfig(
        model=args.config,
        load_format=LoadFormat.DUMMY,
        dtype="float32",
        max_model_len=args.longest + 96,
        kv_cache_tokens=8 * (args.longest + 96),
        max_num_batched_tokens=args.max_num_batched_tokens,
        calibrate_s=args.calibrate_s,
        compilation_cache_dir=args.compilation_cache_dir,
    )
    driver = Driver(engine, f"colocated:model={devices}")
    (instance,) = instances(driver.cluster).values()
    profile, size = instance.costs.profile, engine.block_size
    assert profile is not None, "nothing was calibrated"
    step = (args.longest - SHORTEST) / (args.lengths - 1)
    lengths = [round(SHORTEST + step * number) for number in range(args.lengths)]
    work = [(tokens, share, tokens * share // 100 // size * size) for tokens in lengths for share in SHARES]
    times: dict[tuple[int, int, int], list[float]] = {one: [] for one in work}
    with tqdm(total=args.repeats * len(work), desc=f"{devices} devices") as bar:
        for _ in range(args.repeats):
            for tokens, share, cached in work:
                prefix = driver.prompt(cached + 1)  # its last token's block is not whole
                if cached:
                    driver.run([prefix], 1)
                start, first, found = driver.run([(*prefix[:cached], *driver.prompt(tokens - cached))], 1)
                assert found[0] == cached, f"{found[0]} and not {cached} tokens were cached"
                times[tokens, share, cached].append(first[0][0] - start)
                bar.update(1)
    driver.cluster.stop()
    rows = [
        {"devices": devices, "tokens": tokens, "share": share, "cached": cached, "measured_s": typical(seconds)}
        for (tokens, share, cached), seconds in times.items()
    ]
    return profile, rows


def predict(rows: list[Row], profiles: dict[int, Profile]) -> None:
    """Add to each row what every kind of model says, in seconds."""
    arch = {devices: ArchModel.fit(points(rows, devices)) for devices in profiles}
    for row in rows:
        devices, work = row["devices"], (row["tokens"], row["cached"])
        row["op"] = CostModel(profiles[devices]).prefill_s(*work)
        largest, base = profiles[1].steps[-1][:2], profiles[1].steps[-1][2]
        same = next(seconds for *shape, seconds in profiles[devices].steps if tuple(shape) == largest)
        row["op, scaled"] = same / base * CostModel(profiles[1]).prefill_s(*work)
        row["arch"] = arch[1].scaled(1 / devices).prefill_s(*work)
        row["arch, refit"] = arch[devices].prefill_s(*work)


def points(rows: list[Row], devices: int) -> list[tuple[int, int, float]]:
    """What an architecture-level model is fitted to."""
    return [(row["tokens"], row["cached"], row["measured_s"]) for row in rows if row["devices"] == devices]


def mean_errors(rows: list[Row], devices: list[int]) -> list[Row]:
    """The mean relative error of every kind by devices and share; share None: of all."""
    errors = []
    for number in devices:
        for share in (*SHARES, None):
            mine = [row for row in rows if row["devices"] == number and share in (None, row["share"])]
            each = {kind: mean_error([(row[kind], row["measured_s"]) for row in mine]) for kind in KINDS}
            errors.append({"devices": number, "share": share, **each})
    return errors


def show(rows: list[Row], errors: list[Row]) -> None:
    """Both tables."""
    print(f"\n{'devices':>7} {'tokens':>7} {'cached':>7} {'measured':>9}", *(f"{kind:>12}" for kind in KINDS))
    for row in rows:
        head = f"{row['devices']:7} {row['tokens']:7} {row['cached']:7} {1e3 * row['measured_s']:6.0f} ms"
        print(head, *(f"{row[kind] / row['measured_s'] - 1:+12.1%}" for kind in KINDS))
    print(f"\nmean error\n{'devices':>7} {'cached':>7}", *(f"{kind:>12}" for kind in KINDS), "  paper: op, arch")
    for row in errors:
        share = "all" if row["share"] is None else f"{row['share']} %"
        paper = [f"{by_share[row['share']]} %" for by_share in PAPER.values() if row["share"] in by_share]
        shown = ", ".join(paper if row["devices"] == 2 else ())
        print(f"{row['devices']:7} {share:>7}", *(f"{row[kind]:12.1%}" for kind in KINDS), " ", shown)
    print()


def judge(errors: list[Row], devices: list[int]) -> list[tuple[str, bool]]:
    """The aims, and whether they are met."""
    verdicts = []
    for number in devices:
        row = next(row for row in errors if row["devices"] == number and row["share"] is None)
        own = f"devices {number}: mean error of the operator level {row['op']:.1%}"
        verdicts.append((f"{own}, aim {AIM:.0%}", row["op"] <= AIM))
        for kind in ("arch", "arch, refit"):
            verdicts.append((f"{own}, not above that of {kind}, {row[kind]:.1%}", row["op"] <= row[kind]))
    return verdicts


def draw(rows: list[Row], errors: list[Row], path: Path, title: str) -> None:
    """A panel of times per number of devices, and one of errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = list(dict.fromkeys(row["devices"] for row in rows))
    figure, axes = pyplot.subplots(1, len(numbers) + 1, figsize=(5.6 * (len(numbers) + 1), 4.2))
    for axis, devices in zip(axes, numbers, strict=False):
        for color, share in enumerate(SHARES):
            mine = [row for row in rows if row["devices"] == devices and row["share"] == share]
            tokens = [row["tokens"] for row in mine]
            axis.plot(tokens, [row["measured_s"] for row in mine], "o", color=f"C{color}", markersize=3)
            axis.plot(tokens, [row["op"] for row in mine], color=f"C{color}", linewidth=1, label=f"{share} % cached")
        axis.set(xlabel="tokens", ylabel="s", title=f"{devices} devices: measured (points), operator level (lines)")
    bars = [(row, kind) for row in errors if row["share"] is None for kind in KINDS]
    names = [f"{kind}\n{row['devices']} dev." for row, kind in bars]
    axes[-1].bar(names, [100 * row[kind] for row, kind in bars], color=[f"C{KINDS.index(kind)}" for _, kind in bars])
    axes[-1].axhline(100 * AIM, color="black", linewidth=0.8, label="aim")
    axes[-1].tick_params(axis="x", labelsize=6)
    axes[-1].set(ylabel="mean error, %", title="errors")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
