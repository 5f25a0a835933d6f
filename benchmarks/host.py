"""What the host does per decoding step: the real engine around a step that computes nothing.

    python benchmarks/host.py                                 1, 16, 64 and 256 sequences
    python benchmarks/host.py --output results/host-cpu.json
    python benchmarks/host.py --quick                         small sizes where none are given: shows that it works

Scheduler, pool, index, runner and loop are those of an instance; its compiled steps are replaced by programs of the
same signature (as many weights, the pages donated) that compute nothing. All that is left is the host's work:

plan      which sequences advance, blocks for them        arrays   the numbers that the device needs
dispatch  enqueuing the compiled step (and the sampler)   commit   the tokens into sequences, index and events

gap is from a result on the host to the next launch: all of these, messages and deadlines. Medians of the last steps,
in us. loop is what 1,000 additions in Python took before and after: shared machines change their speed from minute to
minute, and all of the host's work with it.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
from pool_parts.rows import Aim, Part

from jmemserve.config import ClusterSpec, EngineConfig, InstanceSpec, LoadFormat, Warmup, parse_mesh
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import Parts, build, read_model_config
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.instance import Instance
from jmemserve.engine.report import SilentReport
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler import messages as m
from jmemserve.types import Request, SamplingParams

HERE = Path(__file__).parent
AIM_US = 100.0  # of plan, arrays, dispatch and commit, with AIM_SEQS sequences
AIM_SEQS = 64
PROMPT = 100  # tokens, about: sequences begin new blocks at different steps
COUNT = 3  # every null step samples this token
BLOCK = 16
VOCABULARY = 128  # small: the null step fills the logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, help="of each; the one whose sum is the median is shown")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: tokens are drawn, by a second program")
    parser.add_argument("--output", type=Path, help="write a JSON file")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    usually = ([1, 4], 40, 1) if args.quick else ([1, 16, AIM_SEQS, 256], 400, 5)
    for name, value in zip(("sequences", "steps", "repeats"), usually, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(*args.sequences, args.steps, args.repeats) < 1 or PROMPT + BLOCK + args.steps > args.max_model_len:
        parser.error("sequences, steps and repeats must be at least 1, and sequences fit into --max-model-len")
    arrange_cpu_devices(1)
    about = machine.about()
    print(json.dumps(about, indent=2))
    part = Part()
    part.tables["per step, in us"] = [
        usual(lambda count=count: measure(count, args.steps, args.max_model_len, args.temperature), args.repeats)
        for count in args.sequences
    ]
    for row in part.tables["per step, in us"]:
        if row["sequences"] == AIM_SEQS:
            part.aims.append(Aim(f"host time per step at {AIM_SEQS} sequences", row["sum_us"], AIM_US, "us"))
    part.show("host")
    if args.output:
        args.output.write_text(json.dumps(about | part.plain(), indent=1) + "\n")


def usual(row: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """Of so many rows, the one whose sum is the median."""
    rows = []
    for _ in range(repeats):
        before = loop_us()
        figures = row()
        rows.append(figures | {"loop_us": (before + loop_us()) / 2})
    return sorted(rows, key=lambda row: row["sum_us"])[len(rows) // 2]


def loop_us() -> float:
    """1,000 additions in Python, in us: the machine's speed at the moment."""
    began, total = time.perf_counter(), 0
    for number in range(200_000):
        total += number
    return (time.perf_counter() - began) * 1e6 / 200


def measure(sequences: int, steps: int, max_model_len: int, temperature: float) -> dict[str, float]:
    """One instance that decodes so many sequences for so many steps."""
    parts, spec = build_parts(sequences, max_model_len)
    make_null(parts)
    counter = CompileCounter()
    ended, left = threading.Event(), [sequences]
    failures: list[BaseException] = []

    def say(message: m.FromInstance) -> None:
        if isinstance(message, m.News):
            left[0] -= sum(event.finish is not None for event in message.events)
            if not left[0]:
                ended.set()

    def fail(error: BaseException) -> None:
        failures.append(error)
        ended.set()

    instance = Instance(spec, parts, lambda peer, message: None, lambda peer: True, say, fail, counter)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=temperature, max_tokens=steps)
    for number in range(sequences):
        prompt = tuple(rng.integers(COUNT + 1, VOCABULARY, PROMPT + number % BLOCK).tolist())
        instance.post(m.Submit(Request(f"r{number}", prompt, params, number, frozenset([2])), "colocated0"))
    instance.start()
    if not ended.wait(600) or failures:
        raise SystemExit(f"{sequences} sequences did not end: {failures}")
    times = instance.load().host
    instance.stop()
    counter.close()
    parts_us = {name: 1e6 * getattr(times, f"{name}_s") for name in ("plan", "arrays", "dispatch", "commit")}
    figures = {f"{name}_us": value for name, value in parts_us.items()}
    return {"sequences": sequences, **figures, "sum_us": sum(parts_us.values()), "gap_us": 1e6 * times.gap_s}


def build_parts(sequences: int, max_model_len: int) -> tuple[Parts, InstanceSpec]:
    """An instance of the 125M shape with few numbers in each of its weights, and room for all sequences."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((HERE / "configs" / "llama-125m" / "config.json").read_text())
        config |= {"hidden_size": 64, "intermediate_size": 64, "vocab_size": VOCABULARY, "head_dim": 16}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = EngineConfig(
            model=folder,
            load_format=LoadFormat.DUMMY,
            dtype="float32",
            block_size=BLOCK,
            max_model_len=max_model_len,
            kv_cache_tokens=max(max_model_len, sequences * 640),
            max_num_seqs=sequences,
            max_num_batched_tokens=max(512, 2 * sequences),
            warmup=Warmup.NONE,
            calibrate_s=0.0,
        )
        cluster = ClusterSpec(parse_mesh("colocated"), engine)
        spec = cluster.instances[0]
        parts = build(spec, engine, read_model_config(engine), 1, 0, LocalExchange(), SilentReport())
    return parts, spec


def make_null(parts: Parts) -> None:
    """Let the runner's steps give back the pages as they came, and the same token for every row."""
    runner = parts.runner

    def step(leaves, pages, last, ints, key):
        shape, _ = key
        logits = jnp.zeros((runner.vocab_size, shape.seqs), jnp.float32).at[COUNT].set(1)
        return pages, logits, jnp.full(runner.max_seqs, COUNT, jnp.int32) + 0 * ints[0]

    runner._step = step
    for shape in parts.shapes:
        runner._compile_step(shape)
    jax.block_until_ready(runner.store.pages)


if __name__ == "__main__":
    main()
