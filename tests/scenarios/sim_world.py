"""A whole cluster in virtual time, on one thread: a real front-end, its clients, its instances, and what goes wrong.

with World("prefill0:prefill decode0:decode") as world:
    world.submit("a", prompt=20, limit=12)
    world.kill("decode0")
    world.run()
    world.clients["a"].check()
"""

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

from sim_cluster import DOWN, Link, Port, Process, Weather
from sim_device import STOP, VOCABULARY, AtOnce, Clock, Threads, Wire, Workers, mixed, slots_of, truth

from jmemserve.config import Bypass, Caching, ClusterSpec, EngineConfig, Role
from jmemserve.engine import cluster as cluster_module
from jmemserve.engine import instance as instance_module
from jmemserve.engine import links, pool_report
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.messages import FromPeer
from jmemserve.errors import Unavailable
from jmemserve.kvpool import audit
from jmemserve.kvpool.node import node as node_module
from jmemserve.kvpool.node import swapper
from jmemserve.scheduler.messages import MemberState
from jmemserve.types import Event, FinishReason, Request, SamplingParams

STEP_S = 0.01
IDLE_S = 0.25  # of a step while nothing moves
TICK_S = 0.05
LIMIT_S = 600.0  # of one ``run``: what is not over then hangs
NATURAL = (FinishReason.STOP, FinishReason.LENGTH)


class Hangs(AssertionError):
    """Something that must end does not."""


@dataclasses.dataclass
class Client:
    """One caller and all that it was told."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None
    error: str = ""
    cached: int = 0
    cut_off: bool = False  # the caller ended it

    def hear(self, event: Event) -> None:
        assert self.finish is None, f"{self.request.id} hears {event} after its end"
        assert event.start == len(self.tokens), f"{self.request.id}: {event} after {len(self.tokens)} tokens"
        self.tokens += event.tokens
        self.finish, self.error = event.finish, event.error
        if event.finish is not None:
            assert event.usage.completion_tokens == len(self.tokens), (event, len(self.tokens))
            self.cached = event.usage.cached_tokens

    def check(self) -> None:
        """What it got is the start of the true output; all of it, if the output ended by itself."""
        expected, finish = truth(self.request)
        assert self.tokens == expected[: len(self.tokens)], f"{self.request.id}: {self.tokens}, not {expected}"
        if self.finish in NATURAL and not self.cut_off:
            assert (self.tokens, self.finish) == (expected, finish), f"{self.request.id}: {self.finish} too early"

    @property
    def text(self) -> list[int]:
        """The prompt and the output."""
        return [*self.request.prompt, *self.tokens]


class _Report:
    """A report that nobody reads but a test that fails."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


class World:
    """To be used with ``with``: meanwhile the parts under test see its clock."""

    def __init__(
        self,
        members: str,
        caching: str = "full",
        block: int = 4,
        blocks: int = 64,
        dram: int = 0,
        seqs: int = 4,
        tokens: int = 32,
        queue: int = 1024,
        bypass: str = "off",
        more: bool = True,
        rejoins: bool = True,
        rng: random.Random | None = None,
    ):
        self.engine = EngineConfig(
            block_size=block,
            caching=Caching(caching),
            bypass=Bypass(bypass),
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_queue=queue,
        )
        self.blocks, self.dram, self.rejoins = blocks, dram, rejoins
        self.disorder = rng is not None  # workers come back in any order, processes take turns in any order
        self.rng = rng or random.Random(0)
        self.late = 0.0  # share of the messages on a link that come although it has ended
        self.clock, self.wire = Clock(), Wire(self.rng)
        self.processes: dict[str, Process] = {}
        self.ports: list[Port] = []
        self.cuts: set[frozenset[str]] = set()
        self.front_weather: dict[str, Weather] = {}
        self.peer_weather: dict[tuple[str, str], Weather] = {}
        self.clients: dict[str, Client] = {}
        self.report = _Report()
        self._members, self._more = members, more
        self._epochs = itertools.count(1)
        self.compiles = CompileCounter()
        self._strays: list[tuple[float, str, FromPeer]] = []
        self._ticked = 0.0
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "World":
        for module in (instance_module, node_module, cluster_module, swapper, pool_report):
            self._patches.enter_context(mock.patch.object(module, "time", self.clock))
        self._patches.enter_context(mock.patch.object(links, "ThreadPoolExecutor", AtOnce))
        for module in (instance_module, links):
            self._patches.enter_context(mock.patch.object(module, "threading", Threads))
        self._patches.enter_context(mock.patch.object(node_module, "ThreadPoolExecutor", Workers))
        report: Any = self.report
        self.cluster = Cluster(ClusterSpec((), self.engine), report, self._on_events)
        self.cluster.vocab_size, self.cluster.expects_more = VOCABULARY, self._more
        self.gateway, self.membership = self.cluster._gateway, self.cluster._membership
        for member in self._members.split():
            name, role = member.split(":")
            self.start(name, role)
        names = list(self.processes)
        self.until(lambda: all(self.state(name) is MemberState.READY for name in names), "all are ready")
        self.cluster.open()
        self.mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()
        self.compiles.close()

    # -- what people and fate do --------------------------------------------------------------------------------------

    def submit(self, name: str, prompt: list[int], limit: int, deadline: float | None = None, **more: Any) -> None:
        stop = frozenset([STOP]) if more.pop("stop", False) else frozenset()
        now = self.clock.now
        params = SamplingParams(max_tokens=limit)
        seed = more.pop("seed", len(self.clients))
        until = None if deadline is None else now + deadline
        request = Request(name, tuple(prompt), params, seed, stop, arrival=now, deadline=until, **more)
        self.clients[name] = Client(request)
        try:
            self.cluster.submit(request)
        except Exception:
            del self.clients[name]
            raise

    def cancel(self, name: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self.clients[name].cut_off = True
        self.cluster.abort(name, reason)

    def start(self, name: str, role: str, facts: str = "") -> None:
        """A process of this name starts; the one before, if there is one, has ended."""
        old = self.processes.get(name)
        if old is not None and old.alive:
            old.end(silent=False)
        self.processes[name] = Process(self, name, Role(role), facts)

    def kill(self, name: str, silent: bool = False) -> None:
        if self.processes[name].alive:
            self.processes[name].end(silent)

    def cut(self, one: str, other: str) -> None:
        """No link between these two, until ``heal``."""
        self.cuts.add(frozenset((one, other)))
        if self.processes[one].alive:
            self.processes[one].links.drop(other)

    def heal(self) -> None:
        """All lines are good and all processes run."""
        self.cuts.clear()
        self.wire.broken = 0.0
        for weather in (*self.front_weather.values(), *self.peer_weather.values()):
            weather.drop = weather.double = weather.swap = weather.delay = 0.0
        for process in self.processes.values():
            process.paused = False

    def stray(self, link: Link) -> None:
        """A link has ended: what is on its lines is lost, or comes late."""
        names = [end.name for end in link.ends]
        for source, target in (names, names[::-1]):
            for message in link.lines[target].take(float("inf")):
                if self.late and self.rng.random() < self.late:
                    due = self.clock.now + self.rng.choice((0.02, 0.5, 5.0))
                    self._strays.append((due, target, FromPeer(source, message)))

    # -- time ---------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Everybody takes a turn."""
        self.clock.now += IDLE_S if self.idle() else STEP_S
        now = self.clock.now
        for port in list(self.ports):
            for message in port.to_front.take(now):
                if message is DOWN:
                    self.cluster.down(port.name, port, "its stream ended")
                    self.ports.remove(port)
                    break
                with contextlib.suppress(Unavailable):
                    self.cluster.on_message(port.name, port, message)
        if now - self._ticked >= TICK_S:
            self._ticked = now
            with contextlib.suppress(Clock.Slept):
                self.cluster._tick()
        for stray in [stray for stray in self._strays if stray[0] <= now]:
            self._strays.remove(stray)
            target = self.processes[stray[1]]
            if target.alive:
                target.instance.post(stray[2])
        turns = list(self.processes.values())
        if self.disorder:
            self.rng.shuffle(turns)
        for process in turns:
            if process.alive and not process.paused:
                process.turn()

    def wait(self, seconds: float) -> None:
        limit = self.clock.now + seconds
        while self.clock.now < limit:
            self.step()

    def until(self, true: Callable[[], bool], what: str, seconds: float = LIMIT_S) -> None:
        """Go on until something is true. Raises Hangs if it does not come."""
        limit = self.clock.now + seconds
        while not true():
            if self.clock.now > limit:
                raise Hangs(f"after {seconds:g} s not yet: {what}\n{self.describe()}")
            self.step()

    def run(self, seconds: float = LIMIT_S) -> None:
        """Go on until every request has ended and nothing is left that waits for anything."""
        self.until(self.quiet, "all is quiet", seconds)

    def idle(self) -> bool:
        """Only time can bring something."""
        return not self._strays and all(process.idle() for process in self.processes.values())

    def quiet(self) -> bool:
        joining = (MemberState.LOADING, MemberState.JOINING)
        settled = not any(record.state in joining for record in self.membership.records.values())
        away = any(process.rejoin_at is not None for process in self.processes.values() if process.alive)
        over = not len(self.gateway) and settled and not away and not self._strays
        return over and all(process.empty() for process in self.processes.values())

    # -- truth --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any time: pools agree with themselves, what can be found is right, and so is what clients got."""
        for process in self.processes.values():
            if process.alive:
                process.instance.pool.check()
                self._check_index(process)
        self.gateway.router.check()
        for client in self.clients.values():
            client.check()

    def check_quiet(self) -> None:
        """And when all is quiet nothing is held, counted or waited for."""
        self.check()
        for name, process in self.processes.items():
            if process.alive:
                pool, scheduler = process.instance.pool, process.instance.scheduler
                stats = pool.stats()
                held = stats.hbm.held, stats.dram.held, pool.owned(), list(scheduler.sequences())
                assert held == (0, 0, {}, []), f"{name}: {held}"
                assert process.instance.node.stats().staged_bytes == 0, f"{name} keeps pieces for others"
        for name in self.gateway.router._instances:
            load = self.gateway.router.load(name)
            assert (load.pending, load.running) == (0, 0), f"{name}: {load}"
        assert len(self.gateway) == len(self.gateway.router) == 0, self.gateway.ids()
        assert all(client.finish is not None for client in self.clients.values())
        assert not self.wire.published, f"still published: {list(self.wire.published)}"

    def _check_index(self, process: Process) -> None:
        """Every block that can be found holds what it is found under."""
        pool, rows = process.instance.pool, process.model.store.rows
        size = pool.block_size
        for node in audit.nodes(pool._index):
            raw, above = node.run, node.parent
            while above is not None:
                raw, above = above.run + raw, above.parent
            tokens = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
            slots = slots_of(tokens, node.space.name.decode().split("\0")[2])
            before = len(tokens) - len(node.hbm) * size
            for place, block in enumerate(node.hbm):
                if block > 0:
                    stretch = slots[before + place * size : before + (place + 1) * size]
                    assert rows[block].tolist() == stretch, f"{process.name}: block {block} is not what it is found as"

    def mark(self) -> None:
        """Count what is computed and moved from here on."""
        self.wire.moved.clear()
        for process in self.processes.values():
            process.model.computed = 0

    # -- asking -------------------------------------------------------------------------------------------------------

    def state(self, name: str) -> MemberState | None:
        record = self.membership.get(name)
        return None if record is None else record.state

    def where(self, request_id: str) -> dict[str, str]:
        """Which instances have the request's present attempt, and in which state of a sequence."""
        inner = self.gateway._inner.get(request_id)
        found = {}
        for name, process in self.processes.items():
            seq = process.instance._by_id.get(inner or "")
            if seq is not None and process.alive:
                found[name] = seq.state.value
        return found

    def next_epoch(self) -> int:
        return next(self._epochs)

    def failed(self, error: BaseException) -> None:
        raise AssertionError("nobody calls this") from error

    def describe(self) -> str:
        lines = [f"requests {self.gateway.ids()}, now {self.clock.now:g}, {self.gateway.counts}"]
        for ticket in self.gateway._tickets.values():
            lines.append(f"  {ticket.outer_id} = {ticket.request.id} at {ticket.homes}: {len(ticket.generated)} tokens")
        for record in (*self.membership.gone, *self.membership.records.values()):
            lines.append(f"{record.name} {record.epoch} {record.state.value} {record.reason} {record.probes or ''}")
        for name, process in self.processes.items():
            node = process.instance.node
            inside = f"{process.instance._by_id.keys()} out {node.sender.by_peer()} in {node.receiver.by_peer()}"
            lines.append(f"  {name} alive={process.alive} idle={process.idle()} {inside} {process.instance.pool}")
        return "\n".join(lines)

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            self.clients[event.request_id].hear(event)


def prompt_of(name: str, count: int) -> list[int]:
    """A prompt that only this name has."""
    state = sum(ord(letter) << 8 * place for place, letter in enumerate(name)) + 1
    tokens = []
    for _ in range(count):
        state = mixed(state, 3)
        tokens.append(state % VOCABULARY)
    return tokens
