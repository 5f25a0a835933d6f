"""One cluster in this process, and what is asked of it."""

import threading
import time

import numpy as np

from jmemserve.config import ClusterSpec, EngineConfig, parse_mesh
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import ConsoleReport
from jmemserve.types import Event, Request, SamplingParams

PATIENCE_S = 600.0


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

    def submit(self, prompts: list[tuple[int, ...]], new_tokens: int) -> list[str]:
        """The ids of requests for so many tokens, which are under way."""
        params = SamplingParams(temperature=0, max_tokens=new_tokens)
        ids = []
        for _ in prompts:
            self._number += 1
            ids.append(f"b{self._number}")
            self.times[ids[-1]], self.ended[ids[-1]] = [], threading.Event()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.cluster.submit(Request(request_id, prompt, params, 0))
        return ids

    def wait(self, ids: list[str]) -> None:
        """Until all of them ended."""
        for request_id in ids:
            if not self.ended[request_id].wait(PATIENCE_S):
                raise SystemExit(f"{request_id} did not end within {PATIENCE_S:.0f} s")

    def wait_for_first(self, ids: list[str]) -> None:
        """Until each has a token."""
        end = time.monotonic() + PATIENCE_S
        while not all(self.times[request_id] for request_id in ids):
            if time.monotonic() > end:
                raise SystemExit(f"some of {len(ids)} requests had no token within {PATIENCE_S:.0f} s")
            time.sleep(0.001)

    def run(self, prompts: list[tuple[int, ...]], new_tokens: int) -> tuple[float, list[list[float]], list[int]]:
        """(start, times of every token of every request, cached tokens of each)."""
        start = time.perf_counter()
        ids = self.submit(prompts, new_tokens)
        self.wait(ids)
        return start, [self.times[i] for i in ids], [self.cached[i] for i in ids]

    def first_token(self, prompt: tuple[int, ...]) -> tuple[float, int]:
        """(seconds, cached tokens)."""
        start, times, found = self.run([prompt], 1)
        return times[0][0] - start, found[0]

    def decode_rate(self, batch: int, context: int, new_tokens: int) -> float:
        """Tokens per second while all of a batch decode."""
        _, times, _ = self.run([self.prompt(context) for _ in range(batch)], new_tokens)
        begin = max(t[0] for t in times)  # from here on every sequence decodes
        last = min(t[-1] for t in times)
        return sum(begin < at <= last for t in times for at in t) / (last - begin)
