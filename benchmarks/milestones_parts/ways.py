"""The arrangements, and two ways to run one: as a user would, in processes behind gRPC, or in this process."""

import contextlib
import dataclasses
import itertools
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from jmemserve.client import Client
from jmemserve.config import ClusterSpec, parse_mesh
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import SilentReport
from jmemserve.server.flags import make_engine_config
from jmemserve.server.messages import Delta
from jmemserve.types import Event, FinishReason, PoolReport, Request, SamplingParams

START_S = 600.0
ANSWER_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """One of those that are compared; all have two devices."""

    name: str
    mesh: str
    caching: str


ARRANGEMENTS = {
    "basic": Arrangement("PD-Basic", "prefill+decode", "none"),
    "c1": Arrangement("PD-Caching-1", "prefill+decode", "prefill"),
    "c2": Arrangement("PD-Caching-2", "prefill+decode", "delta"),
    "c3": Arrangement("PD-Caching-3", "prefill+decode", "full"),
    "cc": Arrangement("PD-CC", "2xcolocated", "full"),
}


@dataclasses.dataclass(slots=True)
class Answer:
    """One request as its client saw it; seconds since it was sent."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    cached: int = 0
    second_s: float = (
        0.0  # the second token: what lies between the first two is a step, and the hand-over if there is one
    )

    def take(self, tokens: Sequence[int], at_s: float) -> None:
        if not tokens:
            return
        if not self.tokens:
            self.first_s = at_s
        if len(self.tokens) < 2 <= len(self.tokens) + len(tokens):
            self.second_s = at_s
        self.last_s = at_s
        self.tokens += tokens


class Way(Protocol):
    """A running arrangement. Threads may share it. Whatever goes wrong raises SystemExit."""

    vocab_size: int

    def ask(self, prompt: tuple[int, ...], max_tokens: int) -> Answer: ...

    def pools(self) -> list[PoolReport]: ...

    def reset(self) -> None:
        """Forget what is cached."""
        ...


@contextlib.contextmanager
def processes(arrangement: Arrangement, engine: dict[str, str], log: Path) -> Iterator[Way]:
    """A server with a process per instance, asked over gRPC."""
    flags = [text for name, value in engine.items() for text in ("--" + name.replace("_", "-"), value)]
    command = [sys.executable, "-m", "jmemserve.serve", "--processes", "per-instance", "--port", "0"]
    command += ["--mesh", arrangement.mesh, "--caching", arrangement.caching, *flags]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        with Client(_address(server, log)) as client:
            yield _Remote(client)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def _address(server: subprocess.Popen, log: Path) -> str:
    """Where it listens, once it is ready."""
    limit = time.monotonic() + START_S
    while time.monotonic() < limit and server.poll() is None:
        text = log.read_text()
        found = re.search(r"listens on (\S+)", text)
        if found and "ready; try" in text:
            return found[1]
        time.sleep(0.2)
    raise SystemExit("the server did not start:\n" + log.read_text()[-3000:])


class _Remote:
    def __init__(self, client: Client):
        self._client = client
        self.vocab_size = client.model_info().vocab_size
        self.pools, self.reset = client.pools, client.reset_prefix_cache

    def ask(self, prompt: tuple[int, ...], max_tokens: int) -> Answer:
        answer, params = Answer(), _params(max_tokens)
        sent = time.perf_counter()
        for message in self._client.stream(prompt, params, timeout_s=ANSWER_S):
            if isinstance(message, Delta):
                answer.take(message.tokens, time.perf_counter() - sent)
                continue
            if message.finish is not FinishReason.LENGTH:
                raise SystemExit(f"an answer ended early, {message.finish.value}: {message.error}")
            answer.cached = message.usage.cached_tokens
        return answer


@contextlib.contextmanager
def inprocess(arrangement: Arrangement, engine: dict[str, str], log: Path) -> Iterator[Way]:
    """All instances in this process, without gRPC."""
    spec = ClusterSpec(parse_mesh(arrangement.mesh), make_engine_config(engine | {"caching": arrangement.caching}))
    way = _Here(spec)
    try:
        yield way
    finally:
        way.cluster.stop()


class _Here:
    def __init__(self, spec: ClusterSpec):
        self._events: dict[str, queue.SimpleQueue[tuple[float, Event]]] = {}
        self._numbers = itertools.count()
        self.cluster = Cluster(spec, SilentReport(), self._on_events)
        self.cluster.start()
        self.vocab_size = self.cluster.vocab_size
        self.pools, self.reset = self.cluster.pools, self.cluster.reset_prefix_cache

    def _on_events(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            self._events[event.request_id].put((now, event))

    def ask(self, prompt: tuple[int, ...], max_tokens: int) -> Answer:
        answer, name = Answer(), f"m{next(self._numbers)}"
        own = self._events[name] = queue.SimpleQueue()
        sent = time.perf_counter()
        self.cluster.submit(Request(name, prompt, _params(max_tokens), 0))
        while True:
            try:
                at, event = own.get(timeout=ANSWER_S)
            except queue.Empty:
                raise SystemExit(f"no news of an answer for {ANSWER_S:g} s; {self.cluster.failure!r}") from None
            answer.take(event.tokens, at - sent)
            if event.finish is not None:
                break
        del self._events[name]
        if event.finish is not FinishReason.LENGTH:
            raise SystemExit(f"an answer ended early, {event.finish.value}: {event.error}")
        answer.cached = event.usage.cached_tokens
        return answer


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


WAYS = {"processes": processes, "inprocess": inprocess}
