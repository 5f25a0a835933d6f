"""A cluster without a model: the same promises as jmemserve.engine.cluster, tokens from a function of the prompt."""

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from jmemserve.config import Role
from jmemserve.errors import DuplicateRequest, Overloaded, Unavailable, UnknownRequest
from jmemserve.scheduler.cost_model import Profile
from jmemserve.types import (
    ClusterReport,
    Event,
    FinishReason,
    InstanceLoad,
    MediumReport,
    MemberReport,
    PoolReport,
    Request,
    Timings,
    TokenLogprobs,
    Usage,
)

PROFILE = Profile(steps=((1, 1, 0.01), (64, 8, 0.02)), pair_s=1e-8, about="made up")
Script = Callable[[Request], Iterable[int]]


class FakeCluster:
    """Gives every running request one token per step, from ``script(request)``; then STOP if that ends."""

    def __init__(self, on_events: Callable[[list[Event]], None], script: Script, max_queue: int = 1000):
        self.on_events, self.script, self.max_queue = on_events, script, max_queue
        self.accepting = True
        self.roles: list[tuple[str, Role]] = []
        self.moved: list[str] = []
        self.drained: list[str] = []
        self.paused = threading.Event()  # while set, no tokens are made
        self.submitted: list[Request] = []
        self.aborted: list[tuple[str, FinishReason]] = []
        self.running: dict[str, tuple[Request, Iterator[int], list[int]]] = {}  # request, tokens to come, tokens made
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._lock:
            if not self.accepting:
                raise Unavailable("draining")
            if request.id in self.running:
                raise DuplicateRequest(f"{request.id} is in flight")
            if len(self.running) >= self.max_queue:
                raise Overloaded("the queue is full", retry_after_s=1.5)
            self.submitted.append(request)
            self.running[request.id] = (request, iter(self.script(request)), [])

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        with self._lock:
            self.aborted.append((request_id, reason))
            known = request_id in self.running
        self._inbox.put(lambda: self._finish(request_id, reason))
        return known

    def loads(self) -> list[InstanceLoad]:
        return [InstanceLoad("colocated0", "colocated", len(self.running), 0, 0, 5, 3, 2, 10, 40, 100, 7, 1, 0)]

    def pools(self) -> list[PoolReport]:
        hbm, dram = MediumReport("HBM", 10, 5, 2, 3, 10 << 20), MediumReport("DRAM", 20, 15, 0, 5, 20 << 20)
        return [
            PoolReport(
                "colocated0",
                (hbm, dram),
                query_tokens=100,
                hit_tokens=40,
                dram_hit_tokens=10,
                peers=(("decode0", "local"),),
                leases=(("decode0", 3, 12.5),),
                oldest=((61.0, 4),),
            ),
            PoolReport("empty", (MediumReport("HBM", 10, 10),)),
        ]

    def reset_prefix_cache(self) -> bool:
        return True

    def report(self) -> ClusterReport:
        peers = (("decode0", "local"),)
        alive = MemberReport("colocated0", "colocated", "ready", 7, "host:1", "local:colocated0")
        alive = dataclasses.replace(alive, load=self.loads()[0], profile=PROFILE.to_json())
        dead = MemberReport("decode0", "decode", "dead", 3, reason="its stream ended", peers=peers)
        return ClusterReport((dead, alive), requests=len(self.running), retries=2, moves=1)

    def set_role(self, name: str, role: Role) -> None:
        self._need(name)
        self.roles.append((name, role))

    def move(self, request_id: str, to: str = "") -> str:
        self._need(to or "colocated0")
        self.moved.append(request_id)
        return to or "colocated0"

    def drain_instance(self, name: str) -> None:
        self._need(name)
        self.drained.append(name)

    @staticmethod
    def _need(name: str) -> None:
        if name != "colocated0":
            raise UnknownRequest(f"no instance {name!r} is ready; those that are: colocated0")

    def drain(self, timeout_s: float) -> bool:
        self.accepting = False
        end = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end:
            time.sleep(0.005)
        left = list(self.running)
        for request_id in left:
            self.abort(request_id)
        while self.running:
            time.sleep(0.005)
        return not left

    def fail(self, sentence: str) -> None:
        """End every request as a dying engine does."""
        self.accepting = False
        events = [Event(id, finish=FinishReason.ERROR, error=sentence) for id in self.running]
        self.running.clear()
        self.on_events(events)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(5)

    async def wait_idle(self) -> None:
        """Wait until nothing runs: what a test asserts to say that all was freed."""
        end = time.monotonic() + 10
        while self.running:
            assert time.monotonic() < end, f"still running: {list(self.running)}"
            await asyncio.sleep(0.002)

    def _run(self) -> None:
        while not self._ended.is_set():
            while not self._inbox.empty():
                self._inbox.get()()
            if self.paused.is_set() or not self.running:
                time.sleep(0.001)
                continue
            self._step()
            time.sleep(0.0005)

    def _step(self) -> None:
        events = []
        with self._lock:
            for request, rest, made in list(self.running.values()):
                if (token := next(rest, None)) is not None:
                    made.append(token)
                    logprobs: tuple[TokenLogprobs, ...] = ()
                    if (count := request.params.logprobs) is not None:
                        top = tuple((other, -float(other)) for other in range(count))
                        logprobs = (TokenLogprobs(token, -0.5, 1, top),)
                    full = request.params.max_tokens is not None and len(made) >= request.params.max_tokens
                    finish = FinishReason.LENGTH if full else None
                    event = Event(request.id, (token,), logprobs, finish, self._usage(request, made), self._timings())
                else:
                    finish = FinishReason.STOP
                    event = Event(request.id, finish=finish, usage=self._usage(request, made), timings=self._timings())
                if finish is not None:
                    del self.running[request.id]
                events.append(event)
        if events:
            self.on_events(events)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        with self._lock:
            entry = self.running.pop(request_id, None)
        if entry is not None:
            request, _, made = entry
            self.on_events([Event(request_id, (), (), reason, self._usage(request, made), self._timings())])

    def _usage(self, request: Request, made: Sequence[int]) -> Usage:
        return Usage(len(request.prompt), len(made), len(request.prompt) // 2)

    def _timings(self) -> Timings:
        return Timings(0.25, 0.5, 0.125, 0.75, 1.5)
