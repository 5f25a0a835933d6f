"""Prefill and decode speed of one instance beside the machine's own limits, measured in the same run.

    python benchmarks/engine.py                      the 125M Llama shape, dummy weights
    python benchmarks/engine.py --config benchmarks/configs/llama-3.1-8b --prompts 512 8192 --batches 1 64 256
    python benchmarks/engine.py --attention xla      without our own kernels
    python benchmarks/engine.py --profile FOLDER     also where the device's time goes; traces for Perfetto in a folder
    python benchmarks/engine.py --quick              small sizes: shows that it works, measures nothing

A step has to read every weight once and each sequence's keys and values; it has to do two FLOP per weight and token
(per prompt for the logits' weight) and the attention products. Its limit is the longer of the two times, by the
bandwidth of memory and by the rate of XLA's own large matrix product. The last table is the time to the first token of
a prompt of which a share is in the cache (paper figure 13), from device memory and from host memory. When --limit is
over nothing else begins, but what is measured once; the results say what is missing.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import machine
import numpy as np
from engine_parts import profiles
from engine_parts.driver import Driver
from tqdm import tqdm

from jmemserve.config import (
    AttentionBackend,
    EngineConfig,
    LoadFormat,
    Quantization,
    SwapPolicy,
)
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import read_model_config, resolve_dtype
from jmemserve.errors import ConfigError

HERE = Path(__file__).parent
SHARES = (0, 25, 50, 75, 100)  # percent of a prompt that is cached


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if min(*args.prompts, *args.batches, args.context, args.new_tokens, args.repeats) < 1:
        parser.error("sizes and repeats must be at least 1")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    try:
        measure(args)
    except ConfigError as error:
        parser.error(str(error))


def measure(args: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    if args.quick:
        args.prompts, args.batches, args.context, args.new_tokens, args.repeats = [64], [2], 16, 16, 1
    arrange_cpu_devices(1)
    longest, steps = max(args.prompts), max(args.batches)
    room = max(2 * longest, steps * (args.context + args.new_tokens + 16))
    engine = EngineConfig(
        model=args.config,
        load_format=LoadFormat.DUMMY,
        dtype=args.dtype,
        quantization=Quantization(args.quantization),
        attention=AttentionBackend(args.attention),
        max_model_len=max(longest, args.context) + args.new_tokens,
        kv_cache_tokens=-(-room // 16) * 16 + 1024,
        max_num_seqs=steps,
        max_num_batched_tokens=max(args.max_num_batched_tokens, steps + 1),
        compilation_cache_dir=args.compilation_cache_dir,
    )
    config = read_model_config(engine)
    dtype = resolve_dtype(engine, config)
    item = np.dtype(jax.numpy.dtype(dtype)).itemsize
    big, size = (8, 128) if args.quick else (256, 2048) if jax.default_backend() == "cpu" else (2048, 8192)
    end = time.monotonic() + args.limit
    driver = Driver(engine)
    bandwidths, rates = [], []
    prefill: dict[int, list[float]] = {length: [] for length in args.prompts}
    decode: dict[int, list[float]] = {batch: [] for batch in args.batches}
    bar = tqdm(total=args.repeats * (len(prefill) + len(decode)), desc="measure")
    for _ in range(args.repeats):
        if rates and time.monotonic() > end:
            break
        bandwidths.append(machine.read_bandwidth(big, 5))
        rates.append(machine.matmul_rate(size, 5, dtype))
        for length in args.prompts:
            prefill[length].append(driver.first_token(driver.prompt(length))[0])
            bar.update(1)
        for batch in args.batches:
            decode[batch].append(driver.decode_rate(batch, args.context, args.new_tokens))
            bar.update(1)
    bar.close()
    bandwidth, rate = float(np.median(bandwidths)), float(np.median(rates))
    weights, kv_per_token = count_weights(config), 2 * config.num_layers * config.num_kv_heads * config.head_dim
    head = config.hidden_size * config.vocab_size  # never quantized
    weight_bytes = item * head + (item if config.quantized is None else 1) * (weights - head)
    per_pair = 4 * config.num_heads * config.head_dim * config.num_layers  # FLOP of a query and a key

    def limit(tokens: int, logits: int, pairs: float, keys: float) -> tuple[float, str]:
        """Steps per second at most, and by what: tokens computed, logits made, (query, key) pairs, keys read."""
        arithmetic = (2 * (weights - head) * tokens + 2 * head * logits + per_pair * pairs) / rate
        memory = (weight_bytes + item * keys * kv_per_token) / bandwidth
        return (1 / arithmetic, "arithmetic") if arithmetic > memory else (1 / memory, "memory")

    rows = []
    for length, seconds in prefill.items():
        most, by = limit(length, 1, length**2 / 2, 0)
        rows.append(("prefill", length, length / float(np.median(seconds)), most * length, by))
    for batch, speeds in decode.items():
        keys = batch * (args.context + args.new_tokens / 2)
        most, by = limit(batch, batch, keys, keys)
        rows.append(("decode", batch, float(np.median(speeds)), most * batch, by))
    results = {
        **machine.about(),
        "model": Path(args.config).name,
        "dtype": dtype,
        "quantization": config.quantized.kind if config.quantized else None,
        "attention": args.attention,
        "bandwidth_gb_s": bandwidth / 1e9,
        "matmul_gflop_s": rate / 1e9,
        "rows": [dict(zip(("what", "size", "tokens_per_s", "limit", "limited_by"), row, strict=True)) for row in rows],
    }
    print(json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=2))
    show(rows)
    keep(args.output, results | {"repeats": len(rates)})
    if args.profile:
        try:
            results["profiles"] = profiled(driver, args)
        except Exception as error:  # what follows is not to be lost by a profiler
            print(f"no profiles: {type(error).__name__}: {error}")
    first: list[dict[str, object]] = []
    for medium in () if args.skip_cached else ("HBM", "DRAM"):
        keep(args.output, results | {"first_token": first})  # so much should the next fail
        if time.monotonic() > end:
            print(f"no time was left for prompts that are cached in {medium}")
            continue
        if medium == "DRAM":
            driver.cluster.stop()
            driver, engine = host_driver(engine, longest)
        first += cached_prompts(medium, driver, engine, longest, args.repeats, end)
    driver.cluster.stop()
    show_first(first)
    keep(args.output, results | {"first_token": first})


def keep(path: Path | None, results: dict[str, object]) -> None:
    """Write what there is so far, if it was asked for."""
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def profiled(driver: Driver, args: argparse.Namespace) -> list[dict[str, object]]:
    """Where the device's time goes while a small and a large batch decode, and in prefilling the longest prompt."""
    found = []

    def note(name: str, work: Callable[[], object]) -> None:
        args.profile.mkdir(parents=True, exist_ok=True)
        trace = args.profile / f"{Path(args.config).name}-{name.replace(' ', '-')}.json.gz"
        whole, kinds = profiles.profile(work, trace)
        profiles.show(name, whole, kinds)
        some = [dataclasses.asdict(kind) for kind in kinds[: profiles.MOST]]
        found.append({"what": name, "seconds": whole, "kinds": some})

    for batch in sorted({min(args.batches), max(args.batches)}):
        ids = driver.submit([driver.prompt(args.context) for _ in range(batch)], args.new_tokens)
        driver.wait_for_first(ids)
        note(f"decode {batch}", functools.partial(driver.wait, ids))
    prompt = driver.prompt(max(args.prompts))
    note(f"prefill {len(prompt)}", functools.partial(driver.first_token, prompt))
    return found


def host_driver(engine: EngineConfig, length: int) -> tuple[Driver, EngineConfig]:
    """One whose device memory holds little more than a prompt, and whose host memory holds some."""
    host = dataclasses.replace(engine, kv_cache_tokens=-(-length // 16) * 16 + 512, swap=SwapPolicy.ALWAYS)
    host = dataclasses.replace(host, host_memory_gb=_gib(host, 6 * length), max_model_len=length + 16)
    return Driver(host), host


def cached_prompts(
    medium: str, driver: Driver, engine: EngineConfig, length: int, repeats: int, end: float
) -> list[dict[str, object]]:
    """Seconds to the first token by the share of the prompt that is cached in a medium."""
    times: dict[int, list[float]] = {share: [] for share in SHARES}
    for repeat in range(repeats):
        if repeat and time.monotonic() > end:
            break
        for share in SHARES:
            kept = length * share // 100 // engine.block_size * engine.block_size
            base = driver.prompt(max(kept, 1))
            driver.first_token(base)
            if medium == "DRAM":  # others take its place in device memory
                for _ in range(-(-(engine.kv_cache_tokens or 0) // length)):
                    driver.first_token(driver.prompt(length))
            seconds, cached = driver.first_token((*base[:kept], *driver.prompt(length - kept)))
            assert cached >= kept - engine.block_size, f"{cached} of {kept} tokens were cached in {medium}"
            times[share].append(seconds)
    return [
        {"medium": medium, "tokens": length, "cached_percent": share, "seconds": float(np.median(seconds))}
        for share, seconds in times.items()
    ]


def _gib(engine: EngineConfig, tokens: int) -> float:
    """Host memory for so many tokens of keys and values."""
    config = read_model_config(engine)
    item = jax.numpy.dtype(resolve_dtype(engine, config)).itemsize
    return tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * item / (1 << 30)


def show(rows: list[tuple[str, int, float, float, str]]) -> None:
    """A table, for people."""
    base = next(row[2] for row in rows if row[0] == "decode")
    print(f"\n{'':8} {'size':>6} {'tokens/s':>10} {'limit':>10} {'by':10} {'of limit':>9} {'of batch 1':>11}")
    for what, size, speed, limit, by in rows:
        times = f"{speed / base:10.2f}x" if what == "decode" else ""
        print(f"{what:8} {size:6} {speed:10.1f} {limit:10.1f} {by:10} {speed / limit:9.1%} {times:>11}")


def show_first(first: list[dict[str, object]]) -> None:
    """Likewise."""
    if first:
        print(f"\nfirst token of {first[0]['tokens']} tokens, by what is cached")
        for row in first:
            print(f"{row['medium']:5} {row['cached_percent']:4} %  {row['seconds']:8.3f} s")


def count_weights(config) -> int:
    """Weights that each token is multiplied with: all but the embedding table, and the experts it does not go to."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mixed = len(config.experts.layers) if config.experts else 0
    inner = (config.num_layers - mixed) * 3 * config.intermediate_size
    if config.experts:
        inner += mixed * (config.experts.per_token * 3 * config.expert_size + config.experts.count)
    return config.hidden_size * (config.num_layers * heads + inner + config.vocab_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "llama-125m"))
    parser.add_argument("--dtype", default="auto", help="as of the server: float32 on CPU")
    parser.add_argument("--quantization", default="auto", choices=[kind.value for kind in Quantization])
    parser.add_argument("--attention", default="auto", choices=[backend.value for backend in AttentionBackend])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024], help="tokens of the prefill tests")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each decoding sequence")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded per sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing else begins")
    parser.add_argument("--profile", type=Path, help="a folder for traces")
    parser.add_argument("--skip-cached", action="store_true", help="no prompts of which a part is cached")
    parser.add_argument("--compilation-cache-dir", help="keep compiled steps here between runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser


if __name__ == "__main__":
    main()
