"""Between asyncio and the engine's threads: who waits for which request's events, and what state the server is in.

    engine thread --on_events(all events of a step)--> call_soon_threadsafe, once --> _dispatch --> inbox of each call
    call: submit -> await inbox -> everything that has piled up becomes one Turn -> ... -> leave

With many calls in flight a call is woken less often, so that several tokens share a message: writing one to a stream
costs more than all else that is done for a token. First tokens and ends never wait.

Everything but ``on_events`` and ``on_failure`` runs on the loop's thread. An id is taken from submission to its final
event, also when its caller has left: no event can reach a later request of the same id.
"""

import asyncio
import contextlib
import enum
import random
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

from jmemserve.config import ClusterSpec, Role
from jmemserve.errors import DuplicateRequest, JmemserveError, Overloaded, Unavailable, UnknownRequest
from jmemserve.server.generation import Generation
from jmemserve.server.messages import Message
from jmemserve.server.model import Model
from jmemserve.types import ClusterReport, Event, FinishReason, InstanceLoad, PoolReport, Request

LOADING = "the server is still loading; try again in a few seconds"
MESSAGES_PER_S = 2500.0  # of all calls together, about: a third of a core
MAX_PACE_S = 0.1  # between two messages of one call, whatever else is to do
CALLS_PER_PLACE = 2  # calls in flight, per place in the engine's queue and batches: others are being tokenised or read


class Cluster(Protocol):
    """The part of the engine that serves; all of it thread-safe and quick, but for ``pools`` and the last two."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool: ...

    def loads(self) -> list[InstanceLoad]: ...

    def pools(self) -> list[PoolReport]: ...

    def reset_prefix_cache(self) -> bool: ...

    def report(self) -> ClusterReport: ...

    def set_role(self, name: str, role: Role) -> None: ...

    def move(self, request_id: str, to: str = "") -> str: ...

    def drain_instance(self, name: str) -> None: ...

    def drain(self, timeout_s: float) -> bool: ...


class State(enum.Enum):
    """What the server is doing; it only moves down this list."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


class _Call:
    """The inbox of one Generate call."""

    def __init__(self) -> None:
        self.events: list[Event] = []  # bounded by the tokens its outputs can have
        self.wake = asyncio.Event()
        self.submitted: set[str] = set()  # ids whose final event has not come
        self.due = 0.0  # on the loop's clock: when it may be woken for a few more tokens
        self.alarm: asyncio.TimerHandle | None = None

    def rouse(self) -> None:
        """Something has come that is worth a message."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
        self.wake.set()


class Frontend:
    """Runs Generate calls on a cluster. Make it on the thread of the running loop."""

    def __init__(self, spec: ClusterSpec):
        self.spec = spec
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()  # set when the engine has failed
        self._loop = asyncio.get_running_loop()
        self._seeds = random.Random(spec.engine.seed)  # of requests that name no seed
        engine = spec.engine
        self._max_calls = CALLS_PER_PLACE * (engine.max_queue + engine.max_num_seqs * len(spec.instances))
        self._cluster: Cluster | None = None
        self._model: Model | None = None
        self._admitted = 0  # calls between their arrival and their end, in whatever state
        self._calls: dict[str, _Call] = {}  # by the caller's request id
        self._owners: dict[str, _Call | None] = {}  # by the engine's id; None: the caller has left

    @property
    def num_calls(self) -> int:
        """Calls in flight."""
        return self._admitted

    @property
    def model(self) -> Model:
        """The served model; raises Unavailable while loading."""
        if self._model is None:
            raise Unavailable(LOADING)
        return self._model

    def open(self, cluster: Cluster, model: Model) -> None:
        """Begin to accept requests, unless the engine has failed or draining has begun already."""
        self._cluster, self._model = cluster, model
        if self.state is State.LOADING:
            self.state = State.SERVING

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count a call while it lasts. Raises Unavailable unless requests are accepted, Overloaded if too many are."""
        self._check_open()
        if self._admitted >= self._max_calls:
            raise Overloaded(f"{self._admitted} calls are in flight, which is the limit; try again later")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def _check_open(self) -> None:
        if self.state is State.LOADING:
            raise Unavailable(LOADING)
        if self.state is State.DRAINING:
            raise Unavailable("the server is shutting down; try another one")
        if self.state is State.FAILED:
            raise Unavailable("the engine has failed; the server is about to end")

    def draw_seed(self) -> int:
        """A seed for a request that names none."""
        return self._seeds.getrandbits(63)

    async def generate(self, generation: Generation) -> AsyncGenerator[tuple[Message, ...]]:
        """Yield the messages of ``generation`` as they come, all of one moment together, until every output has ended.

        Closing the iterator early aborts what is left. Raises, before the first yield only, what submission raises.
        """
        self._check_open()
        assert self._cluster is not None, f"{self.state} without a cluster"
        call = self._enter(generation)
        try:
            self._submit(call, generation.begin())
            while not generation.done:
                await call.wake.wait()
                call.wake.clear()
                events, call.events = call.events, []
                turn = generation.take(events)
                for id in turn.abort:
                    self._cluster.abort(id, FinishReason.STOP)
                messages = list(turn.messages)
                for request in turn.submit:
                    try:
                        self._submit(call, request)
                    except JmemserveError as error:
                        messages.append(generation.refuse(request, error))
                if messages:
                    call.due = self._loop.time() + min(len(self._calls) / MESSAGES_PER_S, MAX_PACE_S)
                    yield tuple(messages)
        finally:
            late = generation.deadline is not None and time.monotonic() >= generation.deadline
            self._leave(generation, call, FinishReason.DEADLINE if late else FinishReason.ABORT)

    def abort(self, request_id: str) -> bool:
        """End every output of a call. Returns whether it was in flight."""
        call = self._calls.get(request_id)
        if call is None or self._cluster is None:
            return False
        for id in list(call.submitted):
            self._cluster.abort(id, FinishReason.ABORT)
        return True

    def loads(self) -> list[InstanceLoad]:
        """The load of every instance; empty while loading."""
        return [] if self._cluster is None else self._cluster.loads()

    async def pools(self) -> list[PoolReport]:
        """The pool of every instance; empty while loading."""
        return [] if self._cluster is None else await asyncio.to_thread(self._cluster.pools)

    def cluster(self) -> ClusterReport:
        """Who belongs to the cluster; empty while loading."""
        return ClusterReport() if self._cluster is None else self._cluster.report()

    def set_role(self, name: str, role: Role) -> None:
        """Let an instance prefer something else. Raises UnknownRequest if there is none of this name."""
        self._check_open()
        assert self._cluster is not None, f"{self.state} without a cluster"
        self._cluster.set_role(name, role)

    def move(self, request_id: str, to: str) -> list[str]:
        """Let every output of a call go on at another instance (empty: the best other one); where each goes.

        Raises UnknownRequest if there is no such call or instance, Unavailable if there is no other instance.
        """
        self._check_open()
        assert self._cluster is not None, f"{self.state} without a cluster"
        call = self._calls.get(request_id)
        if call is None or not call.submitted:
            raise UnknownRequest(f"no request {request_id!r} is in flight")
        return [self._cluster.move(id, to) for id in sorted(call.submitted)]

    def drain_instance(self, name: str) -> None:
        """Let an instance finish and leave. Raises UnknownRequest if there is none of this name."""
        self._check_open()
        assert self._cluster is not None, f"{self.state} without a cluster"
        self._cluster.drain_instance(name)

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no request holds."""
        self._check_open()
        assert self._cluster is not None, f"{self.state} without a cluster"
        return await asyncio.to_thread(self._cluster.reset_prefix_cache)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, finish those in flight, abort what is left after ``timeout_s``. True if nothing was."""
        if self.state in (State.LOADING, State.SERVING):
            self.state = State.DRAINING
        if self._cluster is None or self.state is State.FAILED:
            return True
        limit, clean = time.monotonic() + timeout_s, True
        while True:  # a call may have outputs that it has yet to submit
            clean &= await asyncio.to_thread(self._cluster.drain, max(0.0, limit - time.monotonic()))
            if not self._calls or time.monotonic() >= limit:
                return clean
            await asyncio.sleep(0.01)

    def on_events(self, events: list[Event]) -> None:
        """News of a step; called from the engine's threads."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, events)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            pass

    def on_failure(self, failure: BaseException) -> None:
        """An engine thread has died; called from the engine's threads."""
        try:
            self._loop.call_soon_threadsafe(self._fail, failure)
        except RuntimeError:
            pass

    def _fail(self, failure: BaseException) -> None:
        self.failure = self.failure or failure  # the first one is the cause
        self.state = State.FAILED
        self.ended.set()

    def _dispatch(self, events: list[Event]) -> None:
        now = self._loop.time()
        for event in events:
            call = self._owners.get(event.request_id)
            if event.finish is not None:
                self._owners.pop(event.request_id, None)
            if call is None:
                continue
            if event.finish is not None:
                call.submitted.discard(event.request_id)
            call.events.append(event)
            if event.finish is not None or call.due <= now:
                call.rouse()
            elif call.alarm is None:
                call.alarm = self._loop.call_at(call.due, call.rouse)

    def _enter(self, generation: Generation) -> _Call:
        for id in (generation.request_id, *generation.ids):
            if id in self._owners or id in self._calls:
                raise DuplicateRequest(f"a request with id {generation.request_id!r} is in flight; choose another id")
        call = _Call()
        self._calls[generation.request_id] = call
        self._owners.update(dict.fromkeys(generation.ids, call))
        return call

    def _submit(self, call: _Call, request: Request) -> None:
        assert self._cluster is not None, f"{self.state} without a cluster"
        self._cluster.submit(request)
        call.submitted.add(request.id)

    def _leave(self, generation: Generation, call: _Call, reason: FinishReason) -> None:
        del self._calls[generation.request_id]
        call.rouse()  # no alarm is left
        for id in generation.ids:
            if id not in call.submitted:
                if self._owners.get(id) is call:
                    del self._owners[id]
                continue
            self._owners[id] = None  # until its final event
            assert self._cluster is not None, f"{self.state} without a cluster"
            self._cluster.abort(id, reason)
