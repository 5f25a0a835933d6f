"""Every instance of a deployment in one process, and the router in front of them.

The front-end (or the offline LLM) submits requests and gets events; it never sees an instance. Ids are made unique
here for the time of their life, so that an id may be used again as soon as its last event was delivered, whatever
of it is still on its way between two instances.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable

from jmemserve.config import ClusterSpec
from jmemserve.engine.build import build, check_host_memory, model_folder, read_model_config
from jmemserve.engine.compiles import CompileCounter, keep_compilations
from jmemserve.engine.instance import Instance, Message
from jmemserve.engine.mesh import describe_devices, make_mesh
from jmemserve.engine.messages import Abort, ResetCache, Submit
from jmemserve.engine.report import Report
from jmemserve.engine.selftest import check_arithmetic
from jmemserve.errors import DuplicateRequest, InvalidRequest, Overloaded, Unavailable
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.models import ModelConfig
from jmemserve.scheduler.router import Router
from jmemserve.types import MAX_STOP_IDS, Event, FinishReason, InstanceLoad, PoolReport, Request


@dataclasses.dataclass(slots=True)
class _Ticket:
    """A request in flight."""

    outer_id: str
    request: Request
    homes: tuple[str, ...]  # the instances that may have it
    generated: list[int] = dataclasses.field(default_factory=list)
    started: bool = False  # its first token has come


class Cluster:
    """Instances, links between them, and the router. All methods but ``start`` and ``drain`` return at once.

    ``on_events`` is called from the instances' threads with all events of one step; it must be quick. ``on_failure``
    is called once if an instance's thread dies; every request has got an ERROR event by then.
    """

    def __init__(self, spec: ClusterSpec, report: Report, on_events: Callable[[list[Event]], None]):
        self.spec = spec
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.max_model_len = 0
        self._report, self._on_events = report, on_events
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._tickets: dict[str, _Ticket] = {}  # by inner id
        self._inner: dict[str, str] = {}  # outer id -> inner id
        self._numbers = itertools.count(1)
        self._accepting = self._stopped = False
        self._instances: dict[str, Instance] = {}
        self._router: Router | None = None
        self._compiles: CompileCounter | None = None

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load and compile everything; requests are accepted afterwards. Raises ConfigError or CheckpointError."""
        engine = self.spec.engine
        self.model_config: ModelConfig = read_model_config(engine)
        self.folder = model_folder(engine)
        if engine.compilation_cache_dir is not None:
            keep_compilations(engine.compilation_cache_dir)
        with self._report.phase("devices"):
            grid = describe_devices(self.spec)
            check_arithmetic(make_mesh(self.spec.instances[0], self.spec.num_devices))
        for line in grid:
            self._report.line(f"    {line}")
        check_host_memory(engine, len(self.spec.instances))
        epoch, exchange = time.time_ns(), LocalExchange()
        limits = []
        for spec in self.spec.instances:
            parts = build(spec, engine, self.model_config, self.spec.num_devices, epoch, exchange, self._report)
            limits.append(parts.max_model_len)
            self._instances[spec.name] = Instance(spec, parts, self._send, self._deliver, self._fail)
        self.max_model_len = min(limits)
        self._router = Router([(spec.name, spec.role) for spec in self.spec.instances], engine.block_size)
        self._link_up()
        self._compiles = CompileCounter()
        for instance in self._instances.values():
            instance.compiles = lambda: self._compiles.count if self._compiles else 0
            instance.start()
        self._accepting = True

    def _link_up(self) -> None:
        """Introduce the instances to each other, and move blocks of every piece size over every pair once: that the
        way works, and what it needs to be compiled, is known before the first request."""
        instances = list(self._instances.values())
        for one in instances:
            for other in instances:
                if one is not other:
                    peer = one.node.greet(other.node.peers.hello())
                    self._report.line(f"    {one.spec.name} gets blocks of {peer.name} by {peer.transport.name}")
        for source in instances:
            for target in instances:
                if source is not target:
                    self._try_link(source, target)
        for one in instances:
            one.node.tally.reset()

    def _try_link(self, source: Instance, target: Instance) -> None:
        sizes, room = source.runner.store.sizes, min(source.pool.room(), target.pool.room())
        blocks = source.pool.alloc_mem(
            max(total for n in range(1, len(sizes) + 1) if (total := sum(sizes[:n])) <= room)
        )
        moving = source.node.transfer(target.spec.name, blocks)
        limit = time.monotonic() + 60
        while not moving.done() and time.monotonic() < limit:  # the instances' threads do not run yet
            source.turn()
            target.turn()
        source.node.free_mem([*blocks, *moving.result(0)])
        target.turn()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for the rest; what is left after ``timeout_s`` is aborted (then False)."""
        limit = time.monotonic() + timeout_s
        with self._idle:
            self._accepting = False
            while self._tickets and (rest := limit - time.monotonic()) > 0 and self.failure is None:
                self._idle.wait(min(rest, 1.0))
            left = [ticket.outer_id for ticket in self._tickets.values()]
        for request_id in left:
            self.abort(request_id)
        with self._idle:
            self._idle.wait_for(lambda: not self._tickets or self.failure is not None, timeout=5)
        return not left

    def stop(self) -> None:
        """End every thread."""
        self._accepting, self._stopped = False, True
        for instance in self._instances.values():
            instance.stop()
        if self._compiles is not None:
            self._compiles.close()

    # -- requests ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Start a request; its events follow, the last one with ``finish``.

        Raises InvalidRequest, DuplicateRequest, Overloaded (too many requests wait for their first token), or
        Unavailable (not started, draining, failed).
        """
        self._check(request)
        now = time.monotonic()
        with self._lock:
            # Later outputs of a call that was accepted are no new work: neither a drain nor the queue refuses them.
            taken = bool(request.follows) and self.failure is None and not self._stopped
            if self._router is None or not (self._accepting or taken):
                raise Unavailable("the server is not taking requests: it is starting, draining or has failed")
            if request.id in self._inner:
                raise DuplicateRequest(f"a request with id {request.id!r} is in flight; use another id, or wait for it")
            waiting = sum(not ticket.started for ticket in self._tickets.values())
            if waiting >= self.spec.engine.max_queue and not taken:
                raise Overloaded(f"{waiting} requests wait already (--max-queue); try again later", retry_after_s=1.0)
            inner = f"r{next(self._numbers)}"
            room = self.max_model_len - len(request.prompt)
            params = request.params
            limit = room if params.max_tokens is None else min(room, params.max_tokens)
            resolved = dataclasses.replace(
                request,
                id=inner,
                params=dataclasses.replace(params, max_tokens=limit),
                arrival=request.arrival or now,
            )
            route = self._router.route(inner, resolved.prompt, resolved.salt, now)
            homes = tuple(dict.fromkeys((route.prefill, route.decode)))
            self._tickets[inner] = _Ticket(request.id, resolved, homes)
            self._inner[request.id] = inner
        self._send(route.prefill, Submit(resolved, route.decode))

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request; its last event follows. False if there is no such request (it may just have ended)."""
        with self._lock:
            inner = self._inner.get(request_id)
            homes = self._tickets[inner].homes if inner is not None else ()
        for home in homes:
            self._send(home, Abort(str(inner), reason))
        return inner is not None

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, in the pools and in the router."""
        with self._lock:
            if self._router is None:
                return False
            self._router.forget()
        for instance in self._instances.values():
            instance.post(ResetCache())
        return True

    def loads(self) -> list[InstanceLoad]:
        """A momentary view of every instance."""
        return [instance.load() for instance in self._instances.values()]

    def pools(self) -> list[PoolReport]:
        """All about every instance's pool, for people; waits for the instances' threads."""
        return [instance.report() for instance in self._instances.values()] if self._router is not None else []

    def _check(self, request: Request) -> None:
        vocabulary = self.model_config.vocab_size
        request.params.check()
        if not request.prompt:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if (bad := next((t for t in request.prompt if not 0 <= t < vocabulary), None)) is not None:
            raise InvalidRequest(f"token id {bad} is outside the model's vocabulary, 0 to {vocabulary - 1}")
        if len(request.prompt) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt)} tokens, but at most {self.max_model_len - 1} leave room for an "
                f"answer (the server's --max-model-len is {self.max_model_len}); shorten it"
            )
        if len(request.stop_ids) > MAX_STOP_IDS:
            raise InvalidRequest(
                f"at most {MAX_STOP_IDS} stop token ids, with the model's own, not {len(request.stop_ids)}"
            )
        if (bad := next((t for t in request.stop_ids if not 0 <= t < vocabulary), None)) is not None:
            raise InvalidRequest(f"stop token id {bad} is outside the model's vocabulary, 0 to {vocabulary - 1}")

    # -- from the instances' threads --------------------------------------------------------------------------

    def _send(self, to: str, message: Message) -> None:
        self._instances[to].post(message)

    def _deliver(self, instance: str, events: list[Event]) -> None:
        """Events of one step: the router learns from them, then they go out under the caller's ids."""
        now = time.monotonic()
        out = []
        with self._idle:
            assert self._router is not None
            for event in events:
                ticket = self._tickets.get(event.request_id)
                if ticket is None:
                    continue  # it has ended already
                ticket.generated += event.tokens
                if event.tokens and not ticket.started:
                    ticket.started = True
                    self._router.on_first_token(event.request_id, now)
                if event.finish is not None:
                    self._router.on_finished(event.request_id, (*ticket.request.prompt, *ticket.generated), now)
                    del self._tickets[event.request_id], self._inner[ticket.outer_id]
                out.append(dataclasses.replace(event, request_id=ticket.outer_id))
            if not self._tickets:
                self._idle.notify_all()
        if out:
            self._on_events(out)

    def _fail(self, instance: str, error: BaseException) -> None:
        """An instance's thread has died: every request fails now, none hangs."""
        with self._idle:
            first, self.failure, self._accepting = self.failure is None, self.failure or error, False
            sentence = f"instance {instance} failed: {error!r}"
            events = [
                Event(ticket.outer_id, finish=FinishReason.ERROR, error=sentence) for ticket in self._tickets.values()
            ]
            self._tickets.clear()
            self._inner.clear()
            self._idle.notify_all()
        if events:
            self._on_events(events)
        if first:
            self.on_failure(error)
