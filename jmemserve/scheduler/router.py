"""Which instances a request goes to: one that prefills it and one that decodes it, often the same.

The router keeps what a policy looks at: the prompt trees, loads counted from its own choices at once (so that a burst
does not all go to one instance), and what work costs at each instance. Pure: ``now`` is an argument, and equal calls
give equal routes.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from jmemserve.config import Bypass, Caching, EngineConfig, PromptTrees, Role
from jmemserve.errors import ConfigError, Unavailable
from jmemserve.scheduler.beliefs import Beliefs, Predictions
from jmemserve.scheduler.cost_model import CostModel, Profile
from jmemserve.scheduler.cost_routing import best_decoder
from jmemserve.scheduler.kinds import Kinds
from jmemserve.scheduler.policies import POLICIES
from jmemserve.scheduler.prompt_tree import Holding
from jmemserve.scheduler.sessions import Sessions
from jmemserve.scheduler.view import UNKNOWN, Asked, Candidate, Load, Route, View

OUTPUT_TOKENS = 128.0  # what a request is expected to generate before any has ended
OUTPUT_WEIGHT = 0.02  # of the newest request in the running mean


class InstanceState(enum.Enum):
    """Whether an instance may get new requests."""

    READY = "ready"
    DRAINING = "draining"  # finishes what it has
    DEAD = "dead"  # what it had is lost, its cache too


@dataclasses.dataclass(slots=True, eq=False)
class _Instance(Candidate):
    state: InstanceState = InstanceState.READY


@dataclasses.dataclass(slots=True)
class _Flight:
    """A request on its way. The loads are those of the lives it was routed to: a new life starts with a new one."""

    tokens: tuple[int, ...]
    raw: bytes  # the same, packed
    salt: str
    route: Route
    prefill: _Instance
    decode: _Instance
    prefill_load: Load
    decode_load: Load
    pending: int
    pending_s: float
    source_load: Load | None = None
    sending_s: float = 0.0
    started: bool = False
    session: str = ""
    before: tuple[str, str] | None = None  # where its session was before


class Router:
    """Routes requests among instances, given as (name, role) in the cluster's order; all have one block size.

    ``ttl_s``: the trees learn from responses, and an entry ends after so many seconds (paper section 6). None: they
    follow what the pools tell of their caches.
    """

    def __init__(
        self,
        instances: Sequence[tuple[str, Role]],
        block_size: int,
        policy: str = "cost",
        caching: Caching = Caching.FULL,
        bypass: Bypass = Bypass.OFF,
        ttl_s: float | None = None,
        slots: int = 1 << 20,
    ):
        if policy not in POLICIES:
            raise ConfigError(f"there is no routing policy {policy!r}; the policies are {', '.join(POLICIES)}")
        self._policy, self._bypass, self._slots = POLICIES[policy], bypass is Bypass.AUTO, slots
        self._instances: dict[str, _Instance] = {}
        self._unknown, self._kinds = CostModel(UNKNOWN), Kinds()
        self._output = OUTPUT_TOKENS
        self._block_size = block_size
        self._flights: dict[str, _Flight] = {}
        self._sessions = Sessions()
        self._turn = 0
        self._groups: tuple[list[Candidate], list[Candidate]] | None = None
        self.beliefs = Beliefs(block_size, caching, ttl_s)
        for name, role in instances:
            assert name not in self._instances, f"instance names are not unique: {instances}"
            self.add(name, role)

    def __len__(self) -> int:
        """Requests on their way."""
        return len(self._flights)

    def __contains__(self, instance: str) -> bool:
        return instance in self._instances

    @property
    def predictions(self) -> Predictions:
        """How well what was predicted to be cached agreed with what was."""
        return self.beliefs.predictions

    def load(self, instance: str) -> Load:
        """A copy of what the router counts for an instance."""
        return dataclasses.replace(self._instances[instance].load)

    # -- instances ----------------------------------------------------------------------------------------------------

    def add(self, instance: str, role: Role) -> None:
        """An instance has joined, or begins another life; it gets requests from now on."""
        if instance in self._instances:
            self.remove(instance)
        self._instances[instance] = _Instance(instance, role, self._unknown, slots=self._slots)
        self._groups = None
        self.beliefs.join(instance)

    def remove(self, instance: str) -> None:
        """An instance is gone for good. One that is unknown is nothing to do."""
        if instance in self._instances:
            self.set_state(instance, InstanceState.DEAD)
            del self._instances[instance]
            self._kinds.leave(instance)

    def set_role(self, instance: str, role: Role) -> None:
        """The instance prefers something else; what it holds stays known."""
        self._instances[instance].role = role
        self._groups = None

    def set_state(self, instance: str, state: InstanceState) -> None:
        """Change whether an instance gets requests. A dead one loses its loads and its place in the trees."""
        found = self._instances[instance]
        if found.state is not InstanceState.DEAD and state is InstanceState.DEAD:
            found.load = Load()
            self.beliefs.leave(instance)
        elif found.state is InstanceState.DEAD and state is not InstanceState.DEAD:
            self.beliefs.join(instance)
        found.state = state
        self._groups = None

    def set_profile(self, instance: str, profile: Profile) -> None:
        """What work costs at an instance, as it measured it. Raises ConfigError for one that says nothing."""
        found = self._instances.get(instance)
        if found is not None:
            found.costs, found.pace = self._kinds.place(instance, profile)
            found.measured = True

    def set_others(self, instance: str, requests: int) -> None:
        """So many requests of other front-ends are at an instance."""
        if instance in self._instances:
            self._instances[instance].load.others = requests

    def others(self, instance: str) -> bool:
        """Whether another instance is ready."""
        return any(i.state is InstanceState.READY and i.name != instance for i in self._instances.values())

    # -- requests -----------------------------------------------------------------------------------------------------

    def route(self, request_id: str, tokens: Sequence[int], salt: str, now: float, session: str = "") -> Route:
        """Choose instances for a request and count it there until ``on_finished``.

        Raises Unavailable if no instance is ready.
        """
        assert request_id not in self._flights, f"request {request_id} is routed already"
        prefills, decodes = self._ready()
        if not prefills:
            raise Unavailable("no instance is ready: all are draining or dead")
        home = self._sessions.home(session) if session else None
        raw = self.beliefs.packed(tokens)
        held, later = self.beliefs.held(raw, len(tokens), salt, now)
        asked = Asked(len(tokens), self._output, home)
        view = View(prefills, decodes, later, self._block_size, self._turn, self._bypass, self._without_kept_back(held))
        route = self._policy(asked, view)
        prefill, decode = self._instances[route.prefill], self._instances[route.decode]
        assert prefill.state is decode.state is InstanceState.READY, (route, prefill.state, decode.state)
        self._turn += 1
        flight = _Flight(
            tuple(tokens),
            raw,
            salt,
            route,
            prefill,
            decode,
            prefill.load,
            decode.load,
            pending=len(tokens) - route.predicted_cached_tokens,
            pending_s=_exact(prefill.pace * prefill.costs.prefill_s(len(tokens), route.predicted_cached_tokens)),
            source_load=self._instances[route.source].load if route.source else None,
            sending_s=_exact(prefill.costs.transfer_s(route.source_blocks)) if route.source else 0.0,
            session=session,
            before=home,
        )
        self._flights[request_id] = flight
        self._count(flight, 1)
        if session:
            self._sessions.went(session, (route.prefill, route.decode))
        self.beliefs.promise(prefill.name, raw, salt, now)
        return route

    def on_first_token(self, request_id: str, now: float) -> None:
        """The prompt is computed: the prefill instance has it cached. Unknown and repeated calls do nothing."""
        flight = self._flights.get(request_id)
        if flight is None or flight.started:
            return
        self._count(flight, -1)
        flight.started = True
        self._count(flight, 1)
        self._learn(flight.prefill, flight.prefill_load, flight.tokens, flight.salt, now)

    def on_finished(self, request_id: str, tokens: Sequence[int], now: float, cached: int | None = None) -> None:
        """The request has ended, in whatever way; ``tokens`` are its prompt and output. Unknown ids do nothing.

        ``cached``: how many tokens of the prompt its instance found in its cache, where it said so. What ended before
        its first token was perhaps never computed, so nothing is learnt from it.
        """
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        self._count(flight, -1)
        if flight.started:
            # The last token was never fed back, so its keys and values were never computed.
            self._learn(flight.decode, flight.decode_load, tokens[:-1], flight.salt, now)
            if self.beliefs.caching.returns:
                self._learn(flight.prefill, flight.prefill_load, tokens[:-1], flight.salt, now)
            made = len(tokens) - len(flight.tokens)
            self._output += OUTPUT_WEIGHT * (made - self._output)
            if cached is not None and flight.prefill.load is flight.prefill_load:
                holder = flight.route.source or flight.prefill.name  # who was believed to have it
                self.beliefs.compare(holder, flight.route.predicted_cached_tokens, cached, len(flight.tokens))
        else:
            self._withdraw(flight)

    def moved(self, request_id: str, instance: str) -> None:
        """The request is to go on at another instance. Unknown ids and instances do nothing."""
        flight, to = self._flights.get(request_id), self._instances.get(instance)
        if flight is not None and to is not None:
            self._count(flight, -1)
            flight.decode, flight.decode_load = to, to.load
            self._count(flight, 1)

    def relief(self, tokens: Sequence[int], salt: str, without: str, now: float) -> str | None:
        """Who should go on with a sequence that leaves an instance; None: nobody else is ready."""
        ready = [i for i in self._instances.values() if i.state is InstanceState.READY and i.name != without]
        decoders = [i for i in ready if i.role.decodes] or ready
        if not decoders:
            return None
        held, _ = self.beliefs.held(self.beliefs.packed(tokens), len(tokens), salt, now)
        view = View(decoders, decoders, held, self._block_size)
        return best_decoder(Asked(len(tokens), self._output), view, decoders).name

    def forget(self) -> None:
        """Every instance has dropped its cache."""
        self.beliefs.forget()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[list[Candidate], list[Candidate]]:
        """Who may prefill and who may decode. Any instance can do either: the role only says who is asked first."""
        if self._groups is None:
            ready: list[Candidate] = [i for i in self._instances.values() if i.state is InstanceState.READY]
            self._groups = [i for i in ready if i.role.prefills] or ready, [i for i in ready if i.role.decodes] or ready
        return self._groups

    def _without_kept_back(self, held: Mapping[str, Holding]) -> Mapping[str, Holding]:
        """Where nothing that was decoded goes back, decode instances send no prefixes either."""
        if self.beliefs.caching.returns:
            return held
        return {name: found for name, found in held.items() if self._instances[name].role.prefills}

    @staticmethod
    def _count(flight: _Flight, times: int) -> None:
        """Add a request to the loads, or take it away."""
        prefill, decode = flight.prefill_load, flight.decode_load
        if not flight.started:
            prefill.pending += times * flight.pending
            prefill.pending_s += times * flight.pending_s
            if flight.source_load is not None:
                flight.source_load.sending_s += times * flight.sending_s
            if prefill is not decode:
                prefill.running += times
        decode.running += times
        decode.context += times * len(flight.tokens)

    def _withdraw(self, flight: _Flight) -> None:
        """What ended before its first token was perhaps never computed: it promises nothing, and is nobody's home."""
        load = flight.prefill_load
        if flight.prefill.load is load and flight.prefill.state is not InstanceState.DEAD:
            others = (f for f in self._flights.values() if f.prefill_load is load and not f.started)
            same = (other.raw for other in others if other.salt == flight.salt)
            self.beliefs.withdraw(flight.prefill.name, flight.raw, flight.salt, same)
        if flight.session:
            self._sessions.left(flight.session, (flight.route.prefill, flight.route.decode), flight.before)

    def _learn(self, instance: _Instance, load: Load, tokens: Sequence[int], salt: str, now: float) -> None:
        """The instance has these tokens cached, if it still is the life that computed them."""
        if instance.load is load and instance.state is not InstanceState.DEAD:
            self.beliefs.learn(instance.name, instance.role, tokens, salt, now)

    def check(self) -> None:
        """Assert that the loads are the sums over the requests on their way. Slow: for tests."""
        for instance in self._instances.values():
            load = instance.load
            prefills = [f for f in self._flights.values() if f.prefill_load is load and not f.started]
            decodes = [f for f in self._flights.values() if f.decode_load is load]
            running = len(decodes) + sum(f.decode_load is not load for f in prefills)
            pending, context = sum(f.pending for f in prefills), sum(len(f.tokens) for f in decodes)
            assert (load.pending, load.running, load.context) == (pending, running, context), (
                f"{instance.name}: {load}, {pending=}, {running=}, {context=}"
            )
            seconds = sum(f.pending_s for f in prefills)
            assert load.pending_s == seconds, f"{instance.name}: {load}, {seconds=}"
            sending = sum(f.sending_s for f in self._flights.values() if f.source_load is load and not f.started)
            assert load.sending_s == sending, f"{instance.name}: {load}, {sending=}"
        self.beliefs.check()


def _exact(seconds: float) -> float:
    """About a microsecond as the unit, so that sums have no rounding error and come back to zero."""
    return round(seconds * (1 << 20)) / (1 << 20)


def make_router(engine: EngineConfig) -> Router:
    """The router of a cluster that has no instances yet."""
    learns = engine.prompt_trees is PromptTrees.RESPONSES
    ttl_s = engine.prompt_tree_ttl_s if learns else None
    return Router(
        (), engine.block_size, engine.policy.value, engine.caching, engine.bypass, ttl_s, slots=engine.max_num_seqs
    )
