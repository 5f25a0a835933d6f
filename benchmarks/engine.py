"""Prefill and decode speed of one instance beside the machine's own limits, measured in the same run.

    python benchmarks/engine.py                      the 125M Llama shape, float32, dummy weights
    python benchmarks/engine.py --output results.json

Decode at batch b has to read every weight once per step and each sequence's keys and values: its limit is the memory
bandwidth over those bytes. Prefill has to do two FLOP per weight and token and the attention products: its limit is
the rate of XLA's own large matrix product. The last figure is the time to first token of a prompt whose prefix is
in the cache, beside that of a fresh one.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import machine
import numpy as np
from tqdm import tqdm

from jmemserve.config import ClusterSpec, EngineConfig, LoadFormat, parse_mesh
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import read_model_config
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import ConsoleReport
from jmemserve.types import Event, Request, SamplingParams


class Driver:
    """Sends requests to a cluster and notes when each token came."""

    def __init__(self, engine: EngineConfig, mesh: str = "colocated"):
        self.times: dict[str, list[float]] = {}
        self.ended: dict[str, threading.Event] = {}
        self.cached: dict[str, int] = {}
        self.cluster = Cluster(ClusterSpec(parse_mesh(mesh), engine), ConsoleReport(), self._on_events)
        self.cluster.start()
        self._rng = np.random.default_rng(0)
        self._number = 0

    def _on_events(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            self.times[event.request_id] += [now] * len(event.tokens)
            if event.finish is not None:
                self.cached[event.request_id] = event.usage.cached_tokens
                self.ended[event.request_id].set()

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(3, self.cluster.vocab_size, length).tolist())

    def run(self, prompts: list[tuple[int, ...]], new_tokens: int) -> tuple[float, list[list[float]], list[int]]:
        """(start, times of every token of every request, cached tokens of each)."""
        params = SamplingParams(temperature=0, max_tokens=new_tokens)
        ids = []
        for _ in prompts:
            self._number += 1
            ids.append(f"b{self._number}")
            self.times[ids[-1]], self.ended[ids[-1]] = [], threading.Event()
        start = time.perf_counter()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.cluster.submit(Request(request_id, prompt, params, 0))
        for request_id in ids:
            if not self.ended[request_id].wait(600):
                raise SystemExit(f"{request_id} did not end within 600 s")
        return start, [self.times[i] for i in ids], [self.cached[i] for i in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs" / "llama-125m"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prefill test")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each decoding sequence")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens decoded per sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compilation-cache-dir", help="keep compiled steps here between runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    arrange_cpu_devices(1)
    engine = EngineConfig(
        model=args.config,
        load_format=LoadFormat.DUMMY,
        dtype=args.dtype,
        max_model_len=max(2048, args.prompt + args.new_tokens),
        kv_cache_tokens=32768,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=1024,
        compilation_cache_dir=args.compilation_cache_dir,
    )
    driver = Driver(engine)
    config = read_model_config(engine)
    weights, kv_per_token = count_weights(config), 2 * config.num_layers * config.num_kv_heads * config.head_dim
    item = 4 if args.dtype == "float32" else 2

    results: dict[str, object] = {**machine.about(), "model": args.config, "dtype": args.dtype}
    bandwidths, rates, rows = [], [], []
    bar = tqdm(total=args.repeats * (2 + len(args.batches)), desc="measure")
    prefill, cached, decode = [], [], {batch: [] for batch in args.batches}
    for _ in range(args.repeats):
        bandwidths.append(machine.read_bandwidth(repeats=5))
        rates.append(machine.matmul_rate(repeats=5))
        prompt = driver.prompt(args.prompt)
        start, times, _ = driver.run([prompt], 1)
        prefill.append(times[0][0] - start)
        bar.update(1)
        start, times, found = driver.run([prompt], 1)
        cached.append(times[0][0] - start)
        assert found[0] >= args.prompt - engine.block_size, f"{found[0]} of {args.prompt} prompt tokens were cached"
        bar.update(1)
        for batch in args.batches:
            _, times, _ = driver.run([driver.prompt(args.context) for _ in range(batch)], args.new_tokens)
            begin = max(t[0] for t in times)  # from here on every sequence decodes
            last = min(t[-1] for t in times)
            tokens = sum(begin < at <= last for t in times for at in t)
            decode[batch].append(tokens / (last - begin))
            bar.update(1)
    bar.close()

    bandwidth, rate = float(np.median(bandwidths)), float(np.median(rates))
    flops = 2 * weights * args.prompt + 2 * args.prompt**2 * config.num_heads * config.head_dim * config.num_layers
    speed = args.prompt / float(np.median(prefill))
    rows.append(("prefill", args.prompt, speed, rate / (flops / args.prompt)))
    for batch in args.batches:
        mean_context = args.context + args.new_tokens / 2
        limit = batch * bandwidth / (item * (weights + batch * mean_context * kv_per_token))
        rows.append(("decode", batch, float(np.median(decode[batch])), limit))
    results |= {
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "matmul_gflop_s": rate / 1e9,
        "rows": [dict(zip(("what", "size", "tokens_per_s", "limit"), row, strict=True)) for row in rows],
        "ttft_s": float(np.median(prefill)),
        "ttft_cached_s": float(np.median(cached)),
    }
    print(json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=2))
    base = next(row[2] for row in rows if row[0] == "decode")
    print(f"\n{'':8} {'size':>6} {'tokens/s':>10} {'limit':>10} {'of limit':>9} {'of batch 1':>11}")
    for what, size, speed, limit in rows:
        times = f"{speed / base:10.2f}x" if what == "decode" else ""
        print(f"{what:8} {size:6} {speed:10.1f} {limit:10.1f} {speed / limit:8.1%} {times:>11}")
    fresh, found_in_cache = float(np.median(prefill)), float(np.median(cached))
    print(f"\nTTFT {fresh:.3f} s fresh, {found_in_cache:.3f} s cached: {found_in_cache / fresh:.1%}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    driver.cluster.stop()


def count_weights(config) -> int:
    """Weights that each token is multiplied with: all but the embedding table."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + config.num_heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


if __name__ == "__main__":
    main()
