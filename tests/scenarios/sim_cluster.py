"""Processes of a cluster in virtual time, on one thread: a real instance on simulated links and devices.

Every process takes a turn per step: what has come by its links goes into the inbox, then the body of the instance's
loop runs once. A link is two lines; a line keeps its order, but may lose, double, swap or delay what it carries.
"""

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim_device import Model, Pages, WireTransport

from jmemserve.config import InstanceSpec, Role, SwapPolicy
from jmemserve.engine.build import Parts
from jmemserve.engine.links import Side
from jmemserve.engine.local import Host
from jmemserve.engine.messages import FromPeer
from jmemserve.errors import TransferError, Unavailable
from jmemserve.kvpool import BlockPool, Flags, Granularity
from jmemserve.scheduler.messages import Beat, Left
from jmemserve.scheduler.plan import step_shapes

if TYPE_CHECKING:
    from sim_world import World

BEAT_S = 0.5
REJOIN_S = 1.0
LATENCY_S = 0.005
DOWN = object()  # the last thing on a line: it broke


@dataclasses.dataclass
class Weather:
    """What a line does to its messages."""

    drop: float = 0.0
    double: float = 0.0
    swap: float = 0.0
    delay: float = 0.0


class Line:
    """Messages one way."""

    def __init__(self, weather: Weather, rng: random.Random):
        self.weather, self._rng = weather, rng
        self._queue: deque[tuple[float, Any]] = deque()

    def put(self, message: object, now: float) -> None:
        weather, chance = self.weather, self._rng.random
        if weather.drop and chance() < weather.drop:
            return
        last = self._queue[-1][0] if self._queue else 0.0
        due = max(last, now + LATENCY_S + weather.delay)
        for _ in range(2 if weather.double and chance() < weather.double else 1):
            self._queue.append((due, message))
        if len(self._queue) > 1 and weather.swap and chance() < weather.swap:
            (one, a), (other, b) = self._queue[-2], self._queue[-1]
            self._queue[-2], self._queue[-1] = (one, b), (other, a)

    def take(self, now: float) -> list[Any]:
        taken = []
        while self._queue and self._queue[0][0] <= now:
            taken.append(self._queue.popleft()[1])
        return taken

    def clear(self) -> None:
        self._queue.clear()

    def busy(self) -> bool:
        return any(not isinstance(message, Beat) for _, message in self._queue)


class Port:
    """The front-end's way to one life of an instance."""

    def __init__(self, world: "World", name: str):
        self._world, self.name = world, name
        world.ports.append(self)
        weather = world.front_weather.setdefault(name, Weather())
        self.to_instance, self.to_front = Line(weather, world.rng), Line(weather, world.rng)
        self.closed = ""

    def send(self, message: object) -> None:
        if not self.closed:
            self.to_instance.put(message, self._world.clock.now)

    def beat(self) -> Beat | None:
        return None

    def close(self, reason: str) -> None:
        self.closed = self.closed or reason


class Link:
    """Between two processes."""

    def __init__(self, world: "World", ends: tuple["Process", "Process"]):
        self.ends = ends
        self.lines: dict[str, Line] = {}  # by the receiver's name
        for source, target in (ends, ends[::-1]):
            weather = world.peer_weather.setdefault((source.name, target.name), Weather())
            self.lines[target.name] = Line(weather, world.rng)


def _call[T](function: Callable[[], T]) -> T:
    return function()


class SimLinks:
    """``engine.links.Links`` of a process."""

    def __init__(self, world: "World", process: "Process"):
        self.address = process.name
        self._world, self._process = world, process
        self.up: dict[str, Link] = {}

    def connect(self, address: str) -> str:
        mine, other = self._process, self._world.processes.get(address)
        away = other is None or not other.alive or other.paused or other.renewing
        if other is None or away or frozenset((mine.name, address)) in self._world.cuts:
            raise TransferError("nobody there")
        mine.host.accept(other.host.hello())
        other.host.accept(mine.host.hello())
        link = Link(self._world, (mine, other))
        self.up[address], other.links.up[mine.name] = link, link
        return address

    def send(self, peer: str, message: object) -> None:
        if peer not in self.up:
            raise TransferError("no link")
        self.up[peer].lines[peer].put(message, self._world.clock.now)

    def drop(self, peer: str) -> None:
        link, name = self.up.pop(peer, None), self._process.name
        if link is None:
            return
        self._world.stray(link)
        other = link.ends[link.ends[0] is self._process]
        if other.links.up.get(name) is link:
            del other.links.up[name]
            other.host.on_down(name)
        self._process.host.on_down(peer)

    def peers(self) -> list[str]:
        return list(self.up)

    def close(self) -> None:
        for peer in self.peers():
            self.drop(peer)


class Process:
    """An instance in a process of its own, with its link to the front-end and its links to others."""

    def __init__(self, world: "World", name: str, role: Role, facts: str = ""):
        self.world, self.name, self.facts = world, name, facts or "the same"
        self.alive, self.paused = True, False
        self.port: Port | None = None
        self.refused = ""
        self.flight: Any = None
        self.beaten = 0.0
        self.rejoin_at: float | None = None
        self.renewing = False
        self.host = self._build(role)
        self.instance = self.host.instance
        self.instance.call = _call  # there is one thread
        self.join()

    def _build(self, role: Role) -> Host:
        world = self.world
        epoch = world.next_epoch()
        engine = world.engine
        pool = BlockPool(self.name, epoch, world.blocks, engine.block_size, world.dram)
        store = Pages(world.blocks, engine.block_size)
        arena = Pages(world.dram, engine.block_size) if world.dram else None
        self.transport = WireTransport(world.wire, self.name, epoch)

        def shapes_of(role: Role) -> Any:
            return step_shapes(role.decodes, role.prefills, engine.max_num_seqs, engine.max_num_batched_tokens)

        self.model = Model(store, shapes_of(role), world.clock)
        fakes: tuple[Any, Any, Any] = (self.model, arena, self.transport)
        parts = Parts(
            fakes[0],
            pool,
            fakes[1],
            (fakes[2],),
            Granularity.AUTO,
            Flags.NONE,
            SwapPolicy.ALWAYS,
            engine.caching,
            shapes_of(role),
            shapes_of,
            max_model_len=4096,
        )
        spec = InstanceSpec(self.name, role, 1, 0)
        return Host(spec, parts, self._make_links, self.say, world.failed, world.compiles)

    def _make_links(self, side: Side) -> "SimLinks":
        self.links = SimLinks(self.world, self)
        return self.links

    # -- life ---------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Apply for membership; the first time with the epoch it was built with."""
        world, pool = self.world, self.instance.pool
        epoch = world.next_epoch() if self.renewing else pool.epoch
        self.port, self.beaten = Port(world, self.name), 0.0
        try:
            world.cluster.admit(self.name, epoch, self.instance.role, (("model", self.facts),), self.port, "sim")
        except Unavailable as error:
            self.refused = str(error)
            self.end(silent=True)
            return
        self._epoch = epoch
        if not self.renewing:
            self.say(self.host.ready())

    def say(self, message: object) -> None:
        assert self.port is not None
        self.port.to_front.put(message, self.world.clock.now)
        if isinstance(message, Left):
            self.leaving = True

    leaving = False

    def end(self, silent: bool) -> None:
        """The process is gone. ``silent``: and the machine, so that nobody is told."""
        self.alive, self.flight = False, None
        self.transport.close()
        if self.port is not None:
            self.port.to_instance.clear()
            if not silent:
                self.port.to_front.put(DOWN, self.world.clock.now)
        if not silent:
            self.links.close()

    def turn(self) -> None:
        """Take what has come, and go once round the instance's loop."""
        world, instance = self.world, self.instance
        now = world.clock.now
        assert self.port is not None
        if self.port.closed and self.rejoin_at is None:
            if not world.rejoins:
                self.end(silent=False)
                return
            self.rejoin_at = now + REJOIN_S
        if self.rejoin_at is not None and now >= self.rejoin_at:
            self.rejoin_at, self.renewing = None, True
            self.join()
            if not self.alive:
                return
        for message in self.port.to_instance.take(now):
            instance.post(message)
        for peer, link in list(self.links.up.items()):
            for message in link.lines[self.name].take(now):
                self.host.on_message(FromPeer(peer, message))
        for workers in instance.node._pools:
            workers.run(world.rng if world.disorder else None)
        instance._take_messages(wait=False)
        instance._turned = now
        instance._reap(now)
        plan = instance.scheduler.plan(now)
        instance._swap()
        following = self.model.launch(plan) if plan is not None else None
        if self.flight is not None:
            instance._commit(self.flight)
        self.flight = following
        instance._outbox.flush()
        if self.renewing:
            self._begin_life()
        if now - self.beaten >= BEAT_S:
            self.beaten = now
            self.say(Beat(instance.load()))
        roster = self.host.neighbours._roster
        if roster is not None:
            self.host.neighbours._arrange(roster)
        if self.leaving:
            self.end(silent=False)

    def _begin_life(self) -> None:
        self.host.neighbours.reset()
        try:
            self.instance.begin_life(self._epoch)
        except Unavailable:
            return
        self.renewing = False
        self.say(self.host.ready())

    # -- links, as ``engine.links`` keeps them ------------------------------------------------------------------------

    # -- asking -------------------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """Nothing moves in it or towards it, but time may come."""
        if not self.alive or self.paused:
            return True
        lines = [link.lines[self.name] for link in self.links.up.values()]
        assert self.port is not None
        lines += [self.port.to_instance, self.port.to_front]
        jobs = any(workers.jobs for workers in self.instance.node._pools)
        return not (
            self.flight or jobs or any(line.busy() for line in lines) or not self.instance._mailbox._queue.empty()
        )

    def empty(self) -> bool:
        """It is idle and has nothing that waits for anything."""
        node = self.instance.node
        waits = len(node.sender) + len(node.receiver) + len(self.instance._by_id) + len(self.instance._returns)
        waits += len(self.instance.pool.owned())
        return not self.alive or self.idle() and not waits and node.swapper.idle() and not self.renewing
