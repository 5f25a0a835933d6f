"""One process of an instance that spans several; or all of it, where there is one. Started by test_multihost.py.

    multihost_process.py '{"process": 0, "num": 2, "port": 1234, "devices": 1, "mode": "tokens"}'

The leader prints a line of JSON when it is ready, or what it made, and goes on until it gets SIGTERM. Modes: tokens (of
everything that an instance can do), idle, busy (with steps, all the time), speed (which ends by itself).
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future

import numpy as np

from jmemserve.config import BlockLayout, ClusterSpec, EngineConfig, SwapPolicy, Warmup, parse_mesh
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine import world as worlds
from jmemserve.engine.channel import Follower, Leader
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.replay import fingerprint, lead, run_follower
from jmemserve.engine.report import ConsoleReport
from jmemserve.engine.single import instances
from jmemserve.kvpool.store import PageStore
from jmemserve.types import Event, Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=64)
WARM = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, max_tokens=8, logprobs=2)
SHAPED = SamplingParams(temperature=0.7, repetition_penalty=1.2, min_tokens=4, max_tokens=8)


class Tokens:
    """What comes out of a cluster."""

    def __init__(self, spec: ClusterSpec):
        self._tokens: dict[str, list[int]] = {}
        self._ended: dict[str, threading.Event] = {}
        self.cluster = Cluster(spec, ConsoleReport(), self._on_events)

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            self._tokens[event.request_id] += event.tokens
            if event.finish is not None:
                self._ended[event.request_id].set()

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
        """All at once."""
        names = [f"{len(self._tokens) + i}" for i in range(len(prompts))]
        for seed, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            self._tokens[name], self._ended[name] = [], threading.Event()
            self.cluster.submit(Request(name, tuple(prompt), params, seed))
        for name in names:
            assert self._ended[name].wait(60), self.cluster.failure
        return [self._tokens[name] for name in names]


def prompts(num: int, length: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(2, 1024, (num, length)).tolist()


def move_parts(store: PageStore) -> list[int]:
    """Reads and writes of one layer's keys, which only transfers do; page 0 is nobody's."""
    whole, part = np.asarray(store.gather([3])), store.gather_part([3], 1, 0)
    np.testing.assert_array_equal(np.asarray(part), whole[:, 1, 0])
    store.scatter_part([0], 2, 1, part)
    got = np.asarray(store.gather([0]))[:, 2, 1]
    np.testing.assert_array_equal(got, whole[:, 1, 0])
    return list(got.shape)


def make_tokens(tokens: Tokens) -> dict:
    """All that enqueues device work: steps, every sampler, prefix hits, preemption, swaps out and in."""
    first, many = prompts(3, 40, 1), prompts(9, 60, 2)
    out = {"greedy": tokens.generate(first, GREEDY), "again": tokens.generate(first, GREEDY)}
    out["warm"], out["shaped"] = tokens.generate(first, WARM), tokens.generate(first, SHAPED)
    out["many"], out["many again"] = tokens.generate(many, GREEDY), tokens.generate(many, GREEDY)
    out["long"] = tokens.generate(many[:3], LONG)  # together they need more than there is
    instance = instances(tokens.cluster)["colocated0"]
    answer: Future[list[int]] = Future()
    instance.post(lambda: answer.set_result(move_parts(instance.runner.store)))
    out["parts"] = answer.result(30)
    stats, load = instance.pool.stats(), tokens.cluster.loads()[0]
    out["stats"] = {
        "swapped_out": stats.swapped_out,
        "swapped_in": stats.swapped_in,
        "hits": load.prefix_hits,
        "preemptions": load.preemptions,
        "compiles": load.compiles_after_warmup,
    }
    return out


def measure(tokens: Tokens) -> float:
    """Seconds per decoded token of one sequence."""
    tokens.generate(prompts(1, 8, 3), LONG)
    began = time.monotonic()
    tokens.generate(prompts(1, 8, 4), LONG)
    return (time.monotonic() - began) / LONG.max_tokens


def cluster_spec(num_devices: int, layout: str = "aggregated", **engine: object) -> ClusterSpec:
    """A small pool of the demo model: little is compiled, and much is swapped."""
    settings = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        "kv_cache_tokens": 160,
        "max_model_len": 128,
        "host_memory_gb": 0.03,
        "swap": SwapPolicy.ALWAYS,
        "block_layout": BlockLayout(layout),
        "warmup": Warmup.FAST,
        "calibrate_s": 0.0,
        **engine,
    }
    return ClusterSpec(parse_mesh(f"colocated:model={num_devices}"), EngineConfig(**settings))  # type: ignore[arg-type]


def main(process: int, num: int, port: int, devices: int, mode: str, engine: dict) -> None:
    world = worlds.detect(f"127.0.0.1:{port}", num, process)
    arrange_cpu_devices(devices)
    if world is not None:
        worlds.join(world)
    spec = cluster_spec(devices * num, **engine)
    leader = None
    if world is not None and not world.leads:
        follower = Follower(world, fingerprint(spec))
        signal.signal(signal.SIGTERM, lambda number, frame: follower.ask_to_terminate())
        run_follower(spec, follower, ConsoleReport())
        return worlds.leave()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    if world is not None:
        leader = Leader(world, fingerprint(spec))
    tokens = Tokens(spec)
    tokens.cluster.start()
    if leader is not None:
        lead(instances(tokens.cluster)["colocated0"].runner, leader)
    if mode == "speed":
        print(json.dumps({"ms": 1e3 * measure(tokens)}), flush=True)
        stop.set()
    else:
        print(json.dumps(make_tokens(tokens) if mode == "tokens" else {"ready": True}), flush=True)
    while not stop.wait(0.01):  # until somebody ends it
        if mode == "busy":
            tokens.generate(prompts(1, 8, 3), GREEDY)
    tokens.cluster.stop()
    if leader is not None:
        leader.stop()
    worlds.leave()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        main(**{"engine": {}} | json.loads(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        worlds.leave(1)
        raise
