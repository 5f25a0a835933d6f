"""Runs requests through a Cluster in tests and collects what comes out."""

import dataclasses
import json
import threading
import time
from pathlib import Path

from jmemserve.config import ClusterSpec, EngineConfig, LoadFormat, Warmup, parse_mesh
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import SilentReport
from jmemserve.engine.single import instances
from jmemserve.types import Event, Request, SamplingParams, TokenLogprobs

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tiny_model(folder: Path, **changes: object) -> Path:
    """A folder with a config.json, to be served with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return folder


@dataclasses.dataclass
class Output:
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    end: Event | None = None
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)


class Driver:
    """A cluster with a mailbox. Use as a context manager: leaving it checks that nothing is held any more."""

    def __init__(self, model: Path, mesh: str, **engine: object):
        settings = {
            "model": str(model),
            "load_format": LoadFormat.DUMMY,
            "dtype": "float32",
            "block_size": 4,
            "kv_cache_tokens": 1024,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
            "warmup": Warmup.FULL,
            "calibrate_s": 0.0,  # assumed, so that routes are always the same
        }
        spec = ClusterSpec(parse_mesh(mesh), EngineConfig(**(settings | engine)))  # type: ignore[arg-type]
        self.outputs: dict[str, Output] = {}
        self.cluster = Cluster(spec, SilentReport(), self._on_events)
        self.cluster.start()

    @property
    def instances(self):
        return instances(self.cluster)

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            output = self.outputs[event.request_id]
            assert output.end is None, f"news of {event.request_id} after its end"
            output.tokens += event.tokens
            output.logprobs += event.logprobs
            if event.finish is not None:
                output.end = event
                output.ended.set()

    def submit(self, request_id: str, prompt, params: SamplingParams | None = None, **fields) -> Output:
        output = self.outputs[request_id] = Output()
        params = params or SamplingParams(temperature=0, max_tokens=8)
        seed = params.seed or 0
        self.cluster.submit(Request(request_id, tuple(prompt), params, seed, **fields))
        return output

    def finish(self, *outputs: Output, timeout_s: float = 120) -> None:
        for output in outputs:
            assert output.ended.wait(timeout_s), f"no end within {timeout_s} s; {self.cluster.failure!r}"

    def generate(self, prompts, params) -> list[list[int]]:
        """Submit everything at once and wait; ``params`` is one SamplingParams or a list of them."""
        many = params if isinstance(params, list) else [params] * len(prompts)
        number = len(self.outputs)
        outputs = [self.submit(f"g{number + i}", p, q) for i, (p, q) in enumerate(zip(prompts, many, strict=True))]
        self.finish(*outputs)
        assert self.cluster.failure is None, repr(self.cluster.failure)
        return [output.tokens for output in outputs]

    def assert_nothing_held(self) -> None:
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            loads = self.cluster.loads()
            if all(load.held_blocks == 0 and not load.running and not load.waiting for load in loads):
                break
            time.sleep(0.02)
        for load in self.cluster.loads():
            assert load.held_blocks == 0, load
            assert load.free_blocks + load.cached_blocks == load.total_blocks, load

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if error is None:
                self.assert_nothing_held()
                for instance in self.instances.values():
                    instance.pool.check()
        finally:
            self.cluster.stop()
