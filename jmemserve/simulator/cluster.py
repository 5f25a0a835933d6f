"""The front-end on virtual time: the real gateway and router, its clients, and the modelled instances."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from jmemserve.config import EngineConfig, InstanceSpec
from jmemserve.errors import Overloaded
from jmemserve.scheduler import messages as m
from jmemserve.scheduler.admission import Limits
from jmemserve.scheduler.beliefs import Predictions
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.gateway import Gateway
from jmemserve.scheduler.router import make_router
from jmemserve.simulator.clock import Clock, Host
from jmemserve.simulator.instance import SimInstance
from jmemserve.simulator.load import Job, Load
from jmemserve.simulator.node import Network
from jmemserve.types import Event, Request, SamplingParams

TICK_S = 0.25  # the real front-end looks five times as often; what it looks for takes seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated."""

    instances: tuple[InstanceSpec, ...]
    profiles: Mapping[str, Profile]  # by instance
    engine: EngineConfig  # with ``kv_cache_tokens``
    dram_tokens: int = 0  # of each instance
    cores: float | None = None  # that all instances share; None: enough
    front_end_s: float = 0.0  # that a request spends in the front-end and on the wire, before and after its instance


@dataclasses.dataclass(slots=True)
class Outcome:
    """One request; times in seconds."""

    session: str
    arrival: float
    prompt: int
    asked: int  # tokens wanted
    tokens: int = 0
    cached: int = 0  # prompt tokens found in a prefix cache
    first: float = 0.0
    last: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)

    @property
    def jct(self) -> float:
        return self.last - self.arrival


class SimCluster:
    """Run a load with ``run``; afterwards ``outcomes``, ``instances`` and ``network`` tell what happened."""

    def __init__(self, setting: Setting, progress: Callable[[int], object] = lambda n: None):
        self.setting = setting
        self.clock = Clock()
        self.network = Network(self.clock)
        self.outcomes: list[Outcome] = []
        self._progress = progress
        self._open: dict[str, tuple[Job, Outcome, list[int], list[int]]] = {}
        engine = setting.engine
        assert engine.kv_cache_tokens is not None, "the size of a pool is given in tokens"
        blocks = engine.kv_cache_tokens // engine.block_size, setting.dram_tokens // engine.block_size
        self._router = make_router(engine)
        self._gateway = Gateway(self._router, Limits.of(engine))
        self._ticking = False
        host = Host(self.clock, setting.cores)
        self.instances: dict[str, SimInstance] = {}
        for spec in setting.instances:
            name, profile = spec.name, setting.profiles[spec.name]
            self.instances[name] = SimInstance(
                spec, engine, blocks, CostModel(profile), self.network, host, self._listener(name)
            )
            self._gateway.add(name, spec.role, 0.0)
            self._router.set_profile(name, profile)

    @property
    def predictions(self) -> Predictions:
        """How well the router knew what was cached."""
        return self._router.predictions

    @property
    def tree_blocks(self) -> int:
        """That the router's trees know of now."""
        return self._router.beliefs.tree.num_blocks

    @property
    def pulls(self) -> int:
        """Requests for which a peer was asked to send blocks first."""
        return self._gateway.counts.pulls

    def run(self, load: Load) -> None:
        """Until every request has ended and nothing moves any more."""
        self._next(load)
        while self.clock.step():
            pass
        assert not self._open and not len(self._gateway), f"{len(self._open)} requests hang"

    def check(self) -> None:
        """Assert that the end is clean. Slow."""
        self._router.check()
        for name, instance in self.instances.items():
            instance.check()
            load = self._router.load(name)
            assert load.pending == load.running == 0, f"{name}: {load}"

    def _next(self, load: Load) -> None:
        """Wait for the next arrival: only one of them is looked at ahead."""
        following = next(load, None)
        if following is not None:
            self.clock.at(following[0] + self.setting.front_end_s, self._arrive, load, following[1])

    def _arrive(self, load: Load, job: Job) -> None:
        self._next(load)
        self._send(job)

    def _send(self, job: Job) -> None:
        now = self.clock.now
        prompt = job.prompt()
        outcome = Outcome(job.session, now - self.setting.front_end_s, len(prompt), job.output)
        self.outcomes.append(outcome)
        number = len(self.outcomes)
        params = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True)
        request = Request(str(number), tuple(prompt), params, seed=number, arrival=now, session=job.session)
        longest = self.setting.engine.kv_cache_tokens
        if longest is not None and len(prompt) + job.output > longest:
            outcome.error = f"{len(prompt)} + {job.output} tokens do not fit into a pool of {longest}"
            self._progress(1)
            return
        self._open[request.id] = job, outcome, prompt, []
        try:
            self._gateway.submit(request, now)
        except Overloaded as error:
            del self._open[request.id]
            outcome.error = str(error)
            self._progress(1)
            return
        if not self._ticking:
            self._tick()
        self._flush()

    def _listener(self, name: str) -> Callable[[m.FromInstance], None]:
        """Takes what an instance says, as ``engine.cluster`` does."""
        beliefs = self._router.beliefs

        def say(message: m.FromInstance) -> None:
            now = self.clock.now
            match message:
                case m.News():
                    self._hear(self._gateway.news(name, message.events, now))
                    self._flush()
                case m.Shared():
                    self._gateway.shared(name, message.request_id)
                    self._flush()
                case m.CacheNews():
                    if not beliefs.on_events(name, message.events, now):
                        self.instances[name].post(m.AskCache())
                case m.CacheSnapshot():
                    beliefs.on_snapshot(name, message.snapshot, message.first, message.last)
                case _:
                    raise AssertionError(f"{name} says {message!r}")

        return say

    def _tick(self) -> None:
        """What time demands, as long as there is something to do."""
        now = self.clock.now
        self._hear(self._gateway.tick(now))
        self._flush()
        for name in self._router.beliefs.wanted(now):
            self.instances[name].post(m.AskCache())
        self._ticking = bool(self._open)
        if self._ticking:
            self.clock.at(now + TICK_S, self._tick)

    def _hear(self, events: Iterable[Event]) -> None:
        now = self.clock.now
        for event in events:
            job, outcome, prompt, answer = self._open[event.request_id]
            if event.tokens:
                outcome.first = outcome.first or now
                outcome.last = now
                outcome.tokens += len(event.tokens)
                if job.after is not None:
                    answer += event.tokens
            if event.finish is not None:
                del self._open[event.request_id]
                outcome.cached, outcome.error = event.usage.cached_tokens, event.error
                self._progress(1)
                following = job.after(prompt, answer) if job.after is not None else None
                if following is not None:
                    self.clock.at(now + following[0] + self.setting.front_end_s, self._send, following[1])

    def _flush(self) -> None:
        outbox, self._gateway.outbox = self._gateway.outbox, []
        for name, message in outbox:
            self.instances[name].post(message)
