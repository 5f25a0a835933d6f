"""Which instances a request goes to: one that prefills it and one that decodes it, often the same.

The router knows what it sent and what came back, nothing else: a prompt tree of what instances are believed to hold,
and loads counted from its own choices at once, so that a burst does not all go to one instance.
Pure: ``now`` is an argument, and equal calls give equal routes.
"""

import dataclasses
import enum
from collections.abc import Sequence

from jmemserve.config import Bypass, Caching, Role
from jmemserve.errors import ConfigError, Unavailable
from jmemserve.kvpool.runs import pack
from jmemserve.scheduler.policies import POLICIES, Candidate, View, bypasses
from jmemserve.scheduler.prompt_tree import PromptTree
from jmemserve.scheduler.tree_feeds import TtlFeed

TREE_BLOCKS = 1 << 16  # of one instance
TREE_TTL_S = 600.0
MOVED_TOKEN_COST = 1 / 16  # of moving a token's keys and values, where computing them is 1


class InstanceState(enum.Enum):
    """Whether an instance may get new requests."""

    READY = "ready"
    DRAINING = "draining"  # finishes what it has
    DEAD = "dead"  # what it had is lost, its cache too


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. A role is a preference: ``decode`` may be a prefill instance that nobody relieves."""

    prefill: str
    decode: str
    predicted_cached_tokens: int  # of the prompt, at the prefill instance


@dataclasses.dataclass(slots=True)
class Load:
    """What an instance has to do, of all that was routed to it in its present life."""

    pending: int = 0  # tokens to be computed before a first token
    running: int = 0  # requests


@dataclasses.dataclass(slots=True)
class _Instance:
    name: str
    role: Role
    state: InstanceState = InstanceState.READY
    load: Load = dataclasses.field(default_factory=Load)


@dataclasses.dataclass(slots=True)
class _Flight:
    """A request on its way. The loads are those of the lives it was routed to: a new life starts with a new one."""

    tokens: tuple[int, ...]
    salt: str
    prefill: _Instance
    decode: _Instance
    prefill_load: Load
    decode_load: Load
    pending: int
    started: bool = False


class Router:
    """Routes requests among instances, given as (name, role) in the cluster's order; all have one block size."""

    def __init__(
        self,
        instances: Sequence[tuple[str, Role]],
        block_size: int,
        policy: str = "longest_prefix",
        tree_blocks: int = TREE_BLOCKS,
        tree_ttl_s: float = TREE_TTL_S,
        caching: Caching = Caching.FULL,
        bypass: Bypass = Bypass.OFF,
    ):
        if policy not in POLICIES:
            raise ConfigError(f"there is no routing policy {policy!r}; the policies are {', '.join(POLICIES)}")
        self._policy = POLICIES[policy]
        self._instances = {name: _Instance(name, role) for name, role in instances}
        assert len(self._instances) == len(instances), f"instance names are not unique: {instances}"
        self._caching, self._bypass = caching, bypass
        self._tree = PromptTree(block_size)
        self._block_size, self._tree_blocks, self._tree_ttl_s = block_size, tree_blocks, tree_ttl_s
        self._feeds: dict[str, TtlFeed] = {}
        for name in self._instances:
            self._join(name)
        self._flights: dict[str, _Flight] = {}
        self._turn = 0

    def __len__(self) -> int:
        """Requests on their way."""
        return len(self._flights)

    def __contains__(self, instance: str) -> bool:
        return instance in self._instances

    def load(self, instance: str) -> Load:
        """A copy of what the router counts for an instance."""
        return dataclasses.replace(self._instances[instance].load)

    def add(self, instance: str, role: Role) -> None:
        """An instance has joined, or begins another life; it gets requests from now on."""
        old = self._instances.get(instance)
        if old is not None and old.state is not InstanceState.DEAD:
            self.set_state(instance, InstanceState.DEAD)
        self._instances[instance] = _Instance(instance, role)
        if instance not in self._feeds:
            self._join(instance)

    def _join(self, instance: str) -> None:
        self._tree.join(instance)
        self._feeds[instance] = TtlFeed(self._tree, instance, self._tree_ttl_s, self._tree_blocks)

    def remove(self, instance: str) -> None:
        """An instance is gone for good. One that is unknown is nothing to do."""
        if instance in self._instances:
            self.set_state(instance, InstanceState.DEAD)
            del self._instances[instance], self._feeds[instance]
            self._tree.leave(instance)

    def set_role(self, instance: str, role: Role) -> None:
        """The instance prefers something else; what it holds stays known."""
        self._instances[instance].role = role

    def others(self, instance: str) -> bool:
        """Whether another instance is ready."""
        return any(i.state is InstanceState.READY and i.name != instance for i in self._instances.values())

    def relief(self, tokens: Sequence[int], salt: str, without: str, now: float) -> str | None:
        """Who should go on with a sequence that leaves an instance; None: nobody else is ready."""
        ready = [i for i in self._instances.values() if i.state is InstanceState.READY and i.name != without]
        decoders = [i for i in ready if i.role.decodes] or ready
        if not decoders:
            return None
        return self._pick(decoders, self._held(tokens, salt, now), len(tokens), MOVED_TOKEN_COST).name

    def _held(self, tokens: Sequence[int], salt: str, now: float) -> dict[str, int]:
        for feed in self._feeds.values():
            feed.expire(now)
        blocks = max(0, len(tokens) - 1) // self._block_size  # never the last token, whose logits are needed
        raw = pack(tokens, blocks * self._block_size)
        found = self._tree.match(raw, salt, blocks)
        return {name: holding.blocks * self._block_size for name, holding in found.items()}

    def route(self, request_id: str, tokens: Sequence[int], salt: str, now: float) -> Route:
        """Choose instances for a request and count it there until ``on_finished``.

        Raises Unavailable if no instance is ready.
        """
        assert request_id not in self._flights, f"request {request_id} is routed already"
        ready = [instance for instance in self._instances.values() if instance.state is InstanceState.READY]
        if not ready:
            raise Unavailable("no instance is ready: all are draining or dead")
        held = self._held(tokens, salt, now)
        # Any instance can do either: the role only says who is asked first.
        prefill = self._pick([i for i in ready if i.role.prefills] or ready, held, len(tokens), 1.0)
        decode = prefill
        if not prefill.role.decodes:
            decoders = [instance for instance in ready if instance.role.decodes]
            if decoders:
                decode = self._pick(decoders, held, len(tokens), MOVED_TOKEN_COST)
        if decode is not prefill and self._bypass is Bypass.AUTO:
            one, other = (self._candidate(i, held, len(tokens)) for i in (prefill, decode))
            if bypasses(one, other, MOVED_TOKEN_COST):
                prefill = decode
        cached = held.get(prefill.name, 0)
        pending = len(tokens) - cached
        self._turn += 1
        self._flights[request_id] = _Flight(
            tuple(tokens), salt, prefill, decode, prefill.load, decode.load, pending=pending
        )
        prefill.load.pending += pending
        prefill.load.running += 1
        if decode is not prefill:
            decode.load.running += 1
        return Route(prefill.name, decode.name, cached)

    def on_first_token(self, request_id: str, now: float) -> None:
        """The prompt is computed: the prefill instance has it cached. Unknown and repeated calls do nothing."""
        flight = self._flights.get(request_id)
        if flight is None or flight.started:
            return
        self._leave_prefill(flight)
        flight.started = True
        self._learn(flight.prefill, flight.prefill_load, flight.tokens, flight.salt, now)

    def on_finished(self, request_id: str, tokens: Sequence[int], now: float) -> None:
        """The request has ended, in whatever way; ``tokens`` are its prompt and output. Unknown ids do nothing.

        What ended before its first token was perhaps never computed, so nothing is learnt from it.
        """
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        if flight.started:
            # The last token was never fed back, so its keys and values were never computed.
            self._learn(flight.decode, flight.decode_load, tokens[:-1], flight.salt, now)
            if self._caching.returns:
                self._learn(flight.prefill, flight.prefill_load, tokens[:-1], flight.salt, now)
        else:
            self._leave_prefill(flight)
        flight.decode_load.running -= 1

    def set_state(self, instance: str, state: InstanceState) -> None:
        """Change whether an instance gets requests. A dead one loses its loads and its place in the trees."""
        found = self._instances[instance]
        found.state = state
        if state is InstanceState.DEAD:
            found.load = Load()
            self._feeds[instance].close()

    def forget(self) -> None:
        """Every instance has dropped its cache."""
        self._tree.clear()

    def check(self) -> None:
        """Assert that the loads are the sums over the requests on their way. Slow: for tests."""
        for instance in self._instances.values():
            load = instance.load
            prefills = [f for f in self._flights.values() if f.prefill_load is load and not f.started]
            decodes = [f for f in self._flights.values() if f.decode_load is load]
            running = len(decodes) + sum(f.decode_load is not load for f in prefills)
            pending = sum(flight.pending for flight in prefills)
            assert (load.pending, load.running) == (pending, running), (
                f"{instance.name}: {load}, {pending=}, {running=}"
            )
        self._tree.check()

    def _pick(
        self, instances: Sequence[_Instance], held: dict[str, int], num_tokens: int, token_cost: float
    ) -> _Instance:
        candidates = tuple(self._candidate(instance, held, num_tokens) for instance in instances)
        return self._instances[self._policy(View(candidates, self._turn, token_cost))]

    @staticmethod
    def _candidate(instance: _Instance, held: dict[str, int], num_tokens: int) -> Candidate:
        cached, load = held.get(instance.name, 0), instance.load
        return Candidate(instance.name, cached, num_tokens - cached, load.pending, load.running)

    def _leave_prefill(self, flight: _Flight) -> None:
        flight.prefill_load.pending -= flight.pending
        if flight.decode_load is not flight.prefill_load:
            flight.prefill_load.running -= 1

    def _learn(self, instance: _Instance, load: Load, tokens: Sequence[int], salt: str, now: float) -> None:
        """The instance has these tokens cached, if it caches and still is the life that computed them."""
        if not self._caching.keeps(instance.role):
            return
        if instance.load is load and instance.state is not InstanceState.DEAD:
            raw = pack(tokens, len(tokens) // self._block_size * self._block_size)
            self._feeds[instance.name].learn(raw, salt, now)
