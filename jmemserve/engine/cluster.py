"""The cluster as a front-end has it: who is a member, and which requests are where. Thread-safe.

    server, LLM ──submit, abort──▶ Cluster ──Port.send──▶ instances, in this process or in others
                ◀───on_events────          ◀─on_message──

It decides nothing: ``scheduler.membership`` and ``scheduler.gateway`` do, and this carries out what they say, under one
lock, so that what an instance is told and what a client hears is in order.
"""

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jmemserve.config import ClusterSpec, Role
from jmemserve.engine.checks import check_request
from jmemserve.engine.ports import Port
from jmemserve.engine.report import Report
from jmemserve.errors import JmemserveError, Unavailable, UnknownRequest
from jmemserve.scheduler import messages as m
from jmemserve.scheduler.admission import Limits
from jmemserve.scheduler.gateway import Gateway
from jmemserve.scheduler.membership import Change, Membership, Record
from jmemserve.scheduler.router import make_router
from jmemserve.types import ClusterReport, Event, FinishReason, InstanceLoad, PoolReport, Request

TICK_S = 0.05
POOLS_S = 5.0  # a report that takes longer is given up


class Cluster:
    """Members and requests. All methods but ``start``, ``pools``, ``drain`` and ``stop`` return at once.

    ``on_events`` is called under a lock with all that is new, in order; it must be quick. ``on_failure`` is called
    once, when no instance is left and none may come again: every request has got an ERROR event by then.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        report: Report,
        on_events: Callable[[list[Event]], None],
        name: str = "",
        membership: Membership | None = None,
    ):
        """``name``: unlike that of any other front-end, or of a former life; ``membership``: who decides on members."""
        self.spec, self.name = spec, name
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self.max_model_len, self.vocab_size = 0, 0  # known once an instance is ready
        self.folder = Path()
        self.expects_more = False  # instances may come (again): a request waits for one rather than fail
        self._report, self._on_events = report, on_events
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._gateway = Gateway(make_router(spec.engine), Limits.of(spec.engine), name)
        self._membership = membership or Membership(spec.engine.heartbeat_timeout_s)
        self._ports: dict[str, Port] = {}
        self._watchers = self._membership.watchers = dict[str, Port]()  # other front-ends
        self._pool_news: dict[str, PoolReport] = {}
        self._accepting = self._stopped = False
        self._closers: list[Callable[[], None]] = []
        self._ticker = threading.Thread(target=self._tick, name="cluster", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Build the instances of the spec in this process and open. Raises ConfigError or CheckpointError."""
        from jmemserve.engine.single import start_instances

        self._ticker.start()
        self._closers.append(start_instances(self, self._report))
        self.open()

    def listen(self, folder: Path, vocab_size: int) -> None:
        """Take members from other processes, of the model in ``folder``; ``open`` when enough are ready."""
        self.folder, self.vocab_size, self.expects_more = folder, vocab_size, True
        self._ticker.start()

    def open(self) -> None:
        """Accept requests."""
        with self._lock:
            self._accepting = True
            self._membership.serving = True

    def expect_no_more(self) -> None:
        """No instance will come any more; if none is left, that is the end."""
        with self._lock:
            self.expects_more = False
            self._end_if_alone("none can be started any more", None, [])

    def wait_ready(self, count: int, timeout_s: float) -> bool:
        """Wait until so many instances are ready. False if the time is up or one of them died."""
        limit = time.monotonic() + timeout_s
        with self._changed:
            while True:
                records = self._membership.records.values()
                if sum(record.state is m.MemberState.READY for record in records) >= count:
                    return True
                dead = any(record.state is m.MemberState.DEAD for record in records) and not self.expects_more
                if dead or self._stopped or (rest := limit - time.monotonic()) <= 0:
                    return False
                self._changed.wait(min(rest, 1.0))

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for the rest; what is left after ``timeout_s`` is aborted (then False)."""
        limit = time.monotonic() + timeout_s
        with self._changed:
            self._accepting = False
            while len(self._gateway) and (rest := limit - time.monotonic()) > 0 and self.failure is None:
                self._changed.wait(min(rest, 1.0))
            left = self._gateway.ids()
        for request_id in left:
            self.abort(request_id)
        with self._changed:
            self._changed.wait_for(lambda: not len(self._gateway) or self.failure is not None, timeout=5)
        return not left

    def stop(self) -> None:
        """End every thread and every member's link."""
        with self._changed:
            self._accepting, self._stopped = False, True
            ports = [*self._ports.values(), *self._watchers.values()]
            self._changed.notify_all()
        for port in ports:
            port.close("the front-end ends")
        for close in self._closers:
            close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Start a request; its events follow, the last one with ``finish``.

        Raises InvalidRequest, DuplicateRequest, Overloaded (too many requests wait for their first token), or
        Unavailable (not started, draining, failed).
        """
        check_request(request, self.vocab_size, self.max_model_len)
        now = time.monotonic()
        with self._lock:
            # Later outputs of a call that was accepted are no new work: neither a drain nor the queue refuses them.
            taken = bool(request.follows) and self.failure is None and not self._stopped
            if not (self._accepting or taken):
                raise Unavailable("the server is not taking requests: it is starting, draining or has failed")
            room = self.max_model_len - len(request.prompt)
            limit = room if request.params.max_tokens is None else min(room, request.params.max_tokens)
            params = dataclasses.replace(request.params, max_tokens=limit)
            resolved = dataclasses.replace(request, params=params, arrival=request.arrival or now)
            self._gateway.submit(resolved, now, accepted=taken, patient=self._hopeful())
            self._flush()

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request; its last event follows. False if there is no such request (it may just have ended)."""
        with self._lock:
            events = self._gateway.abort(request_id, reason, time.monotonic())
            self._flush(events)
        return events is not None

    def move(self, request_id: str, to: str = "") -> str:
        """Ask a request to go on at another instance (empty: the best other one), its stream unbroken; which.

        Raises UnknownRequest if there is no such request or instance, Unavailable if there is no other.
        """
        with self._lock:
            if to:
                self._need(to)
            if request_id not in self._gateway.ids():
                raise UnknownRequest(f"no request {request_id!r} is in flight")
            target = self._gateway.move(request_id, to or None, time.monotonic())
            self._flush()
        if target is None:
            raise Unavailable(f"there is no other instance for {request_id!r} to go to")
        return target

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, in the pools and in the router."""
        with self._lock:
            self._gateway.router.forget()
            for port in self._ports.values():
                port.send(m.ResetCache())
            return bool(self._ports)

    # -- instances ----------------------------------------------------------------------------------------------------

    def members(self) -> list[Record]:
        """Every instance, and those that have left or died, oldest first; copies."""
        with self._lock:
            records = [*self._membership.gone, *self._membership.records.values()]
            return [dataclasses.replace(record) for record in records]

    def report(self) -> ClusterReport:
        """The cluster, for people."""
        now = time.monotonic()
        with self._lock:
            self._beat(now)
            members = self._membership.report(now)
            return self._gateway.report(members)

    def loads(self) -> list[InstanceLoad]:
        """A momentary view of every instance that is a member."""
        with self._lock:
            self._beat(time.monotonic())
            return [record.load for record in self._membership.alive() if record.load is not None]

    def pools(self) -> list[PoolReport]:
        """All about every instance's pool, for people; waits for the instances' threads. Raises Unavailable."""
        with self._changed:
            self._pool_news.clear()
            asked = [name for name in self._ports if self._membership.records[name].address]
            for name in asked:
                self._ports[name].send(m.AskPool(self.name))

            def answered() -> bool:
                return all(name in self._pool_news or name not in self._ports for name in asked)

            if not self._changed.wait_for(answered, POOLS_S):
                raise Unavailable(f"no report from {[name for name in asked if name not in self._pool_news]}")
            return [self._pool_news[name] for name in asked if name in self._pool_news]

    def set_role(self, name: str, role: Role) -> None:
        """Let an instance prefer something else; its cache stays. Raises UnknownRequest."""
        with self._lock:
            self._need(name)
            self._membership.change_role(name, role)
            self._flush()

    def drain_instance(self, name: str) -> None:
        """Give an instance nothing new, let what it has go on elsewhere, then let it leave. Raises UnknownRequest."""
        now = time.monotonic()
        with self._lock:
            self._need(name)
            self._apply(self._membership.drain(name, now), now)

    def admit(
        self, name: str, epoch: int, role: Role, facts: Sequence[tuple[str, str]], port: Port, place: str = ""
    ) -> str:
        """A new member, which loads from now on; its name (one is made if it has none). Raises Unavailable."""
        now = time.monotonic()
        with self._lock:
            if self._stopped:
                raise Unavailable("the front-end is ending")
            name = name or self._membership.free_name(role)
            self._apply(self._membership.admit(name, epoch, role, facts, now, place), now)
            self._ports[name] = port
            return name

    def watch(self, name: str, port: Port | None) -> None:
        """Tell another front-end who is there, now and whenever that changes; None: not any more."""
        with self._lock:
            self._watchers.pop(name, None)
            if port is not None:
                self._watchers[name] = port
                port.send(self._membership.roster())

    def change(self, decide: Callable[[float], list[Change]]) -> None:
        """Carry out what its membership, asked at this moment, has heard from elsewhere."""
        now = time.monotonic()
        with self._lock:
            self._apply(decide(now), now)

    def on_message(self, name: str, port: Port, message: m.FromInstance) -> None:
        """What a member says. Raises Unavailable if it cannot stay, and says why."""
        now = time.monotonic()
        with self._lock:
            if self._ports.get(name) is not port:
                raise Unavailable(f"{name} is no member any more")
            match message:
                case m.News() | m.Tokens():
                    self._flush(self._gateway.news(name, message.events, now))
                case m.Shared():
                    self._gateway.shared(name, message.request_id)
                    self._flush()
                case m.CacheNews():
                    if not self._gateway.router.beliefs.on_events(name, message.events, now):
                        port.send(m.AskCache(self.name))
                case m.CacheSnapshot():
                    snapshot, ends = message.snapshot, (message.first, message.last)
                    self._gateway.router.beliefs.on_snapshot(name, snapshot, *ends)
                case m.CostNews():
                    message.profile.check()
                    self._membership.learnt(name, message.profile)
                    self._gateway.router.set_profile(name, message.profile)
                case m.Beat():
                    self._apply(self._membership.beat(name, message, now), now)
                    self._gateway.heard(name, message)
                case m.Ready():
                    try:
                        self._apply(self._membership.ready(name, message, now), now)
                    except JmemserveError as error:
                        self._apply(self._membership.dead(name, str(error), now), now)
                        raise
                case m.Probed():
                    self._apply(self._membership.probed(name, message, now), now)
                case m.PoolNews():
                    self._pool_news[name] = message.report
                    self._changed.notify_all()
                case m.Leaving():
                    self._apply(self._membership.drain(name, now), now)
                case m.Left():
                    self._apply(self._membership.left(name, now), now)

    def down(self, name: str, port: Port, reason: str, error: BaseException | None = None) -> None:
        """The way to a member has ended, or its thread has died."""
        now = time.monotonic()
        with self._lock:
            if self._ports.get(name) is not port:
                return
            if error is not None and not self._stopped:
                self._report.line(f"{name} died:\n{''.join(traceback.format_exception(error))}")
            self._apply(self._membership.dead(name, reason, now), now, error)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _need(self, name: str) -> Record:
        record = self._membership.get(name)
        if record is None or record.state is not m.MemberState.READY:
            ready = [r.name for r in self._membership.alive() if r.state is m.MemberState.READY]
            raise UnknownRequest(f"no instance {name!r} is ready; those that are: {', '.join(ready) or 'none'}")
        return record

    def _hopeful(self) -> bool:
        """May an instance get ready soon, if none is?"""
        coming = (m.MemberState.LOADING, m.MemberState.JOINING)
        return self.expects_more or any(record.state in coming for record in self._membership.alive())

    def _apply(self, changes: Sequence[Change], now: float, error: BaseException | None = None) -> None:
        """Let the requests follow what became of instances."""
        events: list[Event] = []
        for change in changes:
            record = self._membership.records.get(change.name)
            match change.state:
                case m.MemberState.READY if record is not None:
                    if change.name in self._gateway.router:
                        self._gateway.router.set_role(change.name, record.role)
                    else:
                        self.max_model_len = min(self.max_model_len or record.max_model_len, record.max_model_len)
                        events += self._gateway.add(change.name, record.role, now)
                        if record.profile is not None:
                            self._gateway.router.set_profile(change.name, record.profile)
                        self._say(f"{change.name} is ready ({record.role.value})")
                case m.MemberState.DRAINING:
                    self._gateway.drain(change.name, now)
                case m.MemberState.DEAD | m.MemberState.LEFT:
                    events += self._gateway.lost(change.name, now)
                    port = self._ports.pop(change.name, None)
                    if port is not None:
                        port.close(change.reason or "it has left")
                    if change.state is m.MemberState.DEAD:
                        self._say(f"{change.name} is dead: {change.reason}")
                    self._end_if_alone(f"{change.name} was the last: {change.reason}", error, events)
        self._flush(events)

    def _end_if_alone(self, why: str, error: BaseException | None, events: list[Event]) -> None:
        """Nobody is left, and nobody may come: every request fails now, none hangs."""
        if not self._accepting or self._membership.alive() or self._hopeful() or self.failure is not None:
            return
        sentence = f"no instance is left; {why}"
        self.failure, self._accepting = error or Unavailable(sentence), False
        events += self._gateway.fail_all(sentence, time.monotonic())
        self._flush(events)
        events.clear()
        self.on_failure(self.failure)

    def _say(self, line: str) -> None:
        if self._accepting:
            self._report.line(line)

    def _flush(self, events: Sequence[Event] | None = None) -> None:
        """Send what the deciding parts want sent, and tell the clients what is new."""
        for outbox in (self._membership.outbox, self._gateway.outbox):
            for name, message in outbox:
                to = self._ports.get(name) or self._watchers.get(name)
                if to is not None:
                    to.send(message)
            outbox.clear()
        if events:
            self._on_events(list(events))
        self._changed.notify_all()

    def _beat(self, now: float) -> None:
        for name, port in list(self._ports.items()):
            beat = port.beat()
            if beat is not None:
                self._apply(self._membership.beat(name, beat, now), now)

    def _tick(self) -> None:
        while not self._stopped:
            now = time.monotonic()
            with self._lock:
                self._beat(now)
                self._apply(self._membership.expire(now), now)
                self._flush(self._gateway.tick(now))
                for name in self._gateway.router.beliefs.wanted(now):
                    self._ports[name].send(m.AskCache(self.name))
                for record in self._membership.alive():
                    if record.state is m.MemberState.DRAINING and not self._gateway.at(record.name):
                        self._ports[record.name].send(m.Leave())
            time.sleep(TICK_S)
