"""One instance in a process of its own: it joins a front-end, serves, and joins again if it lost it.

apply ──▶ welcome(name, epoch) ──▶ load ──▶ ready ──▶ serve ──▶ SIGTERM: drained, left, exit 0
  ▲            └── refused: the reason, exit 2         │
  └── the same life, or a new one; the cache is kept ◀─┘ stream lost
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
import threading
import time
import traceback
from typing import Any

import grpc.aio

from jmemserve.config import ClusterSpec, InstanceSpec
from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine import garbage
from jmemserve.engine.build import build, check_host_memory, model_facts, read_model_config
from jmemserve.engine.calibrating import calibrated
from jmemserve.engine.channel import Follower, Leader
from jmemserve.engine.compiles import CompileCounter, keep_compilations
from jmemserve.engine.links import Side
from jmemserve.engine.local import Host
from jmemserve.engine.mesh import describe_devices
from jmemserve.engine.replay import fingerprint, lead, run_follower
from jmemserve.engine.report import Report
from jmemserve.engine.world import World, detect, join, leave
from jmemserve.errors import ConfigError, JmemserveError, TransferError, Unavailable
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler.messages import Beat, FromInstance, Leaving, Left, MemberState, Roster, shifted
from jmemserve.server.flags import ServeConfig
from jmemserve.server.net.attendance import BEAT_S, Attendance
from jmemserve.server.net.links import GrpcLinks
from jmemserve.server.net.secret import load_secret
from jmemserve.server.net.streams import OPTIONS, Stream, dial, handler, prove_as_client
from jmemserve.server.net.ways import ways_to_others
from jmemserve.server.net.words import FROM_INSTANCE, HANDSHAKE, TO_INSTANCE, Apply, Refused, Welcome
from jmemserve.server.signals import catch_signals, first_of, on_daemon_thread
from jmemserve.types import InstanceLoad

RETRY_S = 0.5  # between two tries to reach the front-end; doubled up to
MAX_RETRY_S = 2.0
FIRST_TRY_S = 60.0  # for the front-end to be reachable at all
LAST_WORDS_S = 0.2  # for messages that are queued
QUIET_S = 60.0  # what is being written when a life ends gets so long to be over


class RefusedError(Unavailable):
    """The front-end does not take this instance, and another try is of no use."""


async def run(config: ServeConfig, report: Report) -> int:
    """Serve as one instance until SIGTERM or Ctrl-C. Returns the exit code.

    0: left; 1: the instance died, or the front-end could not be reached; raises ConfigError if it cannot be a member.
    """
    if config.ends_with_stdin:
        _end_with_stdin()
    world = detect(config.coordinator, config.num_processes, config.process_id)
    if world is not None and not world.leads:
        return await _follow(config, world, report)
    return await Worker(config, world, report).run()


async def _follow(config: ServeConfig, world: World, report: Report) -> int:
    """Be one of the further processes of an instance: repeat on this process's devices what process 0 does."""
    spec, stop = config.cluster, catch_signals()

    def work() -> None:
        arrange_cpu_devices(world.local_devices(spec.num_devices))
        join(world)
        followers.append(Follower(world, fingerprint(spec)))
        run_follower(spec, followers[0], report)

    followers: list[Follower] = []
    working = asyncio.ensure_future(on_daemon_thread(work))
    await first_of(working, stop.wait())
    if not working.done() and followers:
        followers[0].ask_to_terminate()  # process 0 drains first, and then ends all
        await first_of(working, asyncio.sleep(config.shutdown_timeout_s + LAST_WORDS_S))
    if not working.done():
        leave(1)
        return 1  # it was not one of several yet
    try:
        working.result()
    except BaseException:
        traceback.print_exc()
        leave(1)
        raise
    leave()
    return 0


class Worker:
    """The process of one instance."""

    def __init__(self, config: ServeConfig, world: World | None, report: Report):
        assert config.join is not None and config.instance is not None
        self._config, self._world, self._report = config, world, report
        self._leader: Leader | None = None  # of the processes of this instance, if it has several
        self._spec: InstanceSpec = config.instance
        self._engine = config.cluster.engine
        self._secret = load_secret(config.secret_file)
        self._loop = asyncio.get_running_loop()
        self._host: Host | None = None
        self._stream: Stream | None = None
        self._stop = catch_signals()
        self._left = asyncio.Event()
        self._failure: BaseException | None = None
        self._ended = asyncio.Event()
        self._name, self._epoch = config.instance.name, 0
        self._counter: CompileCounter | None = None
        self._frontend = ""  # of this life of the front-end
        self._member = self._goes_on = False  # in the same life as under the front-end before
        self._attendance = Attendance(self._secret, lambda: (self._apply(), self._host))

    async def run(self) -> int:
        config = read_model_config(self._engine)
        self._facts = model_facts(self._engine, config)
        stopping, ended, left = (asyncio.ensure_future(e.wait()) for e in (self._stop, self._ended, self._left))
        joined, delay, began = False, RETRY_S, time.monotonic()
        try:
            while True:
                life = asyncio.ensure_future(self._live())
                await asyncio.wait((life, stopping, ended, left), return_when=asyncio.FIRST_COMPLETED)
                if self._ended.is_set():
                    life.cancel()
                    return self._die()
                if self._stop.is_set() or self._left.is_set():
                    return await self._leave(life)
                error = life.exception()
                if isinstance(error, RefusedError):
                    raise ConfigError(f"{self._config.join} does not take this instance: {error}")
                if isinstance(error, ConfigError):  # what it was given will not do the next time either
                    raise error
                if not isinstance(error, JmemserveError | TimeoutError | None):
                    raise error if error is not None else AssertionError("a life ended without a reason")
                if self._host is not None:
                    joined, delay = True, RETRY_S
                if not joined and time.monotonic() - began > FIRST_TRY_S:
                    raise Unavailable(f"the front-end at {self._config.join} cannot be reached: {error}")
                self._report.line(f"no front-end at {self._config.join} ({error}); trying again in {delay:g} s")
                await asyncio.wait((stopping, ended), timeout=delay, return_when=asyncio.FIRST_COMPLETED)
                delay = min(2 * delay, MAX_RETRY_S)
        finally:
            for wait in (stopping, ended, left):
                wait.cancel()
            if self._host is not None:
                await asyncio.to_thread(self._host.close)
            if self._leader is not None:
                await asyncio.to_thread(self._leader.stop)
                await asyncio.to_thread(leave)

    # -- one life -----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """From joining to the loss of the front-end. Raises Unavailable or TransferError with the reason."""
        channel = grpc.aio.insecure_channel(self._config.join, options=OPTIONS)
        stream, call = dial(channel, "Join")
        beating: asyncio.Task[None] | None = None
        try:
            await self._join(stream)
            self._stream = stream
            beating = self._loop.create_task(self._beat())
            serving = self._loop.create_task(self._serve(stream))
            try:
                await self._get_ready(serving)
                await asyncio.wait((serving, beating), return_when=asyncio.FIRST_COMPLETED)
                for task in (beating, serving):
                    if task.done():
                        task.result()
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        finally:
            self._stream = None
            if self._host is not None:
                self._host.instance.post(self._host.instance.frontends.leave_home)
            if beating is not None:
                beating.cancel()
            call.cancel()
            await channel.close()
        raise Unavailable("the stream ended")

    async def _join(self, stream: Stream) -> None:
        await prove_as_client(stream, self._secret)
        await stream.say(HANDSHAKE.encode(self._apply()))
        answer = HANDSHAKE.decode(await stream.read())
        if isinstance(answer, Refused):
            raise RefusedError(answer.reason) if answer.final else Unavailable(answer.reason)
        if not isinstance(answer, Welcome):
            raise TransferError("the front-end did not answer")
        self._goes_on = self._host is not None and answer.epoch == self._host.instance.pool.epoch
        self._name, self._epoch, self._frontend, self._member = answer.name, answer.epoch, answer.frontend, False

    def _apply(self) -> Apply:
        """What this is, for a front-end."""
        place = f"{os.uname().nodename}:{os.getpid()}"
        role = self._spec.role if self._host is None else self._host.instance.role
        return Apply(self._name, self._epoch, role, self._facts, place)

    async def _get_ready(self, serving: asyncio.Task[None]) -> None:
        """Load, or begin a new life with what is loaded; then tell."""
        work = self._load if self._host is None else self._begin_life
        loading = asyncio.ensure_future(on_daemon_thread(work))
        await asyncio.wait((loading, serving), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():  # the front-end is gone; what is being loaded is of use later
            await asyncio.wait((loading,))
        loading.result()
        host = self._host
        assert host is not None
        host.instance.post(functools.partial(host.instance.frontends.lead, self._frontend))
        self._say(host.ready())

    def _load(self) -> None:
        engine, report = self._engine, self._report
        spec = InstanceSpec(self._name, self._spec.role, self._spec.model_axis, 0)
        cluster = ClusterSpec((spec,), engine)
        world = self._world
        arrange_cpu_devices(world.local_devices(cluster.num_devices) if world else cluster.num_devices)
        if world is not None:
            report.line(f"process 0 of {world.num_processes}, which meet at {world.coordinator}")
            join(world)
            self._leader = Leader(world, fingerprint(cluster), on_terminate=self._ask_to_stop)
        if engine.compilation_cache_dir is not None:
            keep_compilations(engine.compilation_cache_dir)
        with report.phase("devices"):
            for line in describe_devices(cluster):
                report.line(f"    {line}")
        check_host_memory(engine, 1)
        config = read_model_config(engine)
        ways = functools.partial(ways_to_others, secret=self._secret, listen=self._config.listen)
        parts = build(spec, engine, config, cluster.num_devices, self._epoch, LocalExchange(), report, ways)
        if self._leader is not None:
            lead(parts.runner, self._leader)
        parts = calibrated(parts, spec.name, engine, report)  # followers, if there are any, follow already
        self._counter = CompileCounter()
        host = Host(spec, parts, self._make_links, self._say, self._died, self._counter)
        host.instance.start()
        garbage.settle()
        self._host = host

    def _ask_to_stop(self) -> None:
        """Another process of this instance was asked to end."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def _make_links(self, side: Side) -> GrpcLinks:
        links = GrpcLinks(side, self._secret, self._loop, (handler("Attend", self._attendance.serve),))
        links.listen(self._config.listen, self._config.advertise)
        return links

    def _begin_life(self) -> None:
        """What is loaded serves under a front-end that is new to it, in another life if this one was held for over."""
        host = self._host
        assert host is not None
        if self._goes_on:
            host.neighbours.await_roster()
            return
        host.neighbours.reset()
        limit = time.monotonic() + QUIET_S
        while True:
            try:
                host.instance.call(functools.partial(host.instance.begin_life, self._epoch))
                return
            except Unavailable:  # bytes are on their way into some blocks yet
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
            finally:  # after it: who attends from now on, attends the new life
                self._loop.call_soon_threadsafe(self._attendance.end)

    async def _serve(self, stream: Stream) -> None:
        """Hand on what the front-end says, until the stream ends."""
        async for raw in stream.messages():
            message = shifted(TO_INSTANCE.decode(raw), time.monotonic())
            host = self._host
            if isinstance(message, Refused):
                if message.final:
                    raise RefusedError(message.reason)
                raise Unavailable(message.reason)
            if host is None:
                continue
            if isinstance(message, Roster) and not self._member:
                self._note_membership(message)
            host.instance.post(message)

    def _note_membership(self, roster: Roster) -> None:
        """Probes may compile; what is compiled once this instance is ready is a mistake."""
        self._member = any(m.name == self._name and m.state is MemberState.READY for m in roster.members)
        if self._counter is not None:
            self._counter.count = 0
        if self._member:
            self._report.line(f"{self._name} is a member of the cluster at {self._config.join}")

    async def _beat(self) -> None:
        while True:
            host = self._host
            if host is None:
                self._say(Beat(_no_load(self._name, self._spec)))
            elif (beat := host.beat(self._frontend)) is not None:
                self._say(beat)
            await asyncio.sleep(BEAT_S)

    def _say(self, message: FromInstance) -> None:
        stream = self._stream
        if stream is not None:
            stream.put(FROM_INSTANCE.encode(message))
        if isinstance(message, Left):
            self._loop.call_soon_threadsafe(self._left.set)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _died(self, error: BaseException) -> None:
        """On the instance's thread."""
        self._failure = self._failure or error
        self._loop.call_soon_threadsafe(self._ended.set)

    def _die(self) -> int:
        assert self._failure is not None
        sys.stderr.flush()
        sys.stderr.write(f"{self._name} died; this was the first error:\n")
        traceback.print_exception(self._failure, file=sys.stderr)
        sys.stderr.flush()
        return 1

    async def _leave(self, life: asyncio.Future[None]) -> int:
        """Drain: what runs here goes on elsewhere or is finished. A second signal ends the process."""
        self._stop.clear()
        if self._host is not None and self._stream is not None:
            self._report.line(f"draining {self._name}: at most {self._config.shutdown_timeout_s:g} s")
            self._say(Leaving())
            waits: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(event.wait()) for event in (self._left, self._stop, self._ended)
            ]
            limit = self._config.shutdown_timeout_s
            await asyncio.wait(
                [*waits, asyncio.ensure_future(life)], timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            for wait in waits:
                wait.cancel()
            await asyncio.sleep(LAST_WORDS_S)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        self._report.line("stopped")
        return 0


def _no_load(name: str, spec: InstanceSpec) -> InstanceLoad:
    names = [field.name for field in dataclasses.fields(InstanceLoad) if field.type is int]
    counts: dict[str, Any] = dict.fromkeys(names, 0)
    return InstanceLoad(name, spec.role.value, **counts)


def _end_with_stdin() -> None:
    """Nobody supervises this process any more when its standard input ends: so does it."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(0)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
