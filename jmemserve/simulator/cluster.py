"""The front-end on virtual time: the real gateway and router, its clients, and the modelled instances."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from jmemserve.config import Bypass, InstanceSpec, Role
from jmemserve.errors import Overloaded
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.gateway import Gateway
from jmemserve.scheduler.messages import FromInstance, News
from jmemserve.scheduler.router import Route, Router
from jmemserve.simulator.clock import Clock, Host
from jmemserve.simulator.instance import Limits, SimInstance
from jmemserve.simulator.load import Job, Load
from jmemserve.simulator.node import Network
from jmemserve.types import Event, Request, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated."""

    instances: tuple[InstanceSpec, ...]
    profiles: Mapping[Role, Profile]
    limits: Limits = Limits()
    policy: str = "longest_prefix"
    bypass: Bypass = Bypass.OFF
    tree_blocks: int = 1 << 16
    tree_ttl_s: float = 600.0
    max_queue: int = 1024
    cores: float | None = None  # that all instances share; None: enough


@dataclasses.dataclass(slots=True)
class Outcome:
    """One request; times in seconds."""

    session: str
    arrival: float
    prompt: int
    asked: int  # tokens wanted
    tokens: int = 0
    cached: int = 0  # prompt tokens found in a prefix cache
    predicted: int = 0  # the same, as the router believed
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


class _WatchedRouter(Router):
    """Tells what it predicts."""

    predicted: int = 0

    def route(self, request_id: str, tokens: Sequence[int], salt: str, now: float) -> Route:
        route = super().route(request_id, tokens, salt, now)
        self.predicted = route.predicted_cached_tokens
        return route


class SimCluster:
    """Run a load with ``run``; afterwards ``outcomes``, ``instances`` and ``network`` tell what happened."""

    def __init__(self, setting: Setting, progress: Callable[[int], object] = lambda n: None):
        self.setting = setting
        self.clock = Clock()
        self.network = Network(self.clock)
        self.outcomes: list[Outcome] = []
        self._progress = progress
        self._open: dict[str, tuple[Job, Outcome, list[int], list[int]]] = {}
        limits = setting.limits
        self._router = _WatchedRouter(
            [(spec.name, spec.role) for spec in setting.instances],
            limits.block_size,
            setting.policy,
            setting.tree_blocks,
            setting.tree_ttl_s,
            limits.caching,
            setting.bypass,
        )
        self._gateway = Gateway(self._router, setting.max_queue)
        host = Host(self.clock, setting.cores)
        models = {role: CostModel(profile) for role, profile in setting.profiles.items()}
        self.instances: dict[str, SimInstance] = {}
        for spec in setting.instances:
            self.instances[spec.name] = SimInstance(
                spec, limits, models[spec.role], self.network, host, self._listener(spec.name)
            )

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
            self.clock.at(following[0], self._arrive, load, following[1])

    def _arrive(self, load: Load, job: Job) -> None:
        self._next(load)
        self._send(job)

    def _send(self, job: Job) -> None:
        now = self.clock.now
        prompt = job.prompt()
        outcome = Outcome(job.session, now, len(prompt), job.output)
        self.outcomes.append(outcome)
        number = len(self.outcomes)
        params = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True)
        request = Request(str(number), tuple(prompt), params, seed=number, arrival=now)
        longest = self.setting.limits.kv_tokens
        if len(prompt) + job.output > longest:
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
        outcome.predicted = self._router.predicted
        self._flush()

    def _listener(self, name: str) -> Callable[[FromInstance], None]:
        def say(message: FromInstance) -> None:
            assert isinstance(message, News), message
            self._hear(self._gateway.news(name, message.events, self.clock.now))
            self._flush()

        return say

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
                    self.clock.at(now + following[0], self._send, following[1])

    def _flush(self) -> None:
        outbox, self._gateway.outbox = self._gateway.outbox, []
        for name, message in outbox:
            self.instances[name].post(message)
