"""What the router believes that instances hold, where that comes from, and how often it was wrong.

    pools' events ──▶ EventFeed ┐
                                ├──▶ PromptTree ──▶ held(prompt) ◀── promised: what is being computed right now
    responses, TTL ──▶ TtlFeed  ┘

A wrong belief costs time, never correctness: every instance matches the prompt against its own index again.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from jmemserve.config import Caching, Role
from jmemserve.kvpool.events import Removed, Snapshot, Stored
from jmemserve.kvpool.runs import pack, shared_blocks
from jmemserve.scheduler.prompt_tree import Holding, PromptTree
from jmemserve.scheduler.tree_feeds import EventFeed, TtlFeed

LEARNT_BLOCKS = 1 << 16  # of one instance, where the tree learns from responses
PROMISE_S = 10.0  # an instance that gets a prompt will have computed it by then, or be behind with everything
PROMISED_BLOCKS = 1 << 14  # of one instance
WRONG_TOKENS = 0.1  # of a prompt: a prediction that is off by more is wrong
WRONG_IN_A_ROW = 4  # then the tree of the instance is made anew
RENEW_S = 10.0  # but not more often than this
EXPIRE_S = 0.1  # how often what is too old is looked for


@dataclasses.dataclass(slots=True)
class Predictions:
    """Predicted against actual cached tokens, over requests that ended; the sums of all instances."""

    requests: int = 0
    prompt_tokens: int = 0
    predicted_tokens: int = 0
    cached_tokens: int = 0
    over_tokens: int = 0  # predicted and not found
    under_tokens: int = 0  # found and not predicted
    renewals: int = 0  # trees made anew because they were wrong or had missed an event


@dataclasses.dataclass(slots=True)
class _Belief:
    feed: EventFeed | TtlFeed
    promised: TtlFeed
    wrong: int = 0  # predictions in a row
    stale: bool = False  # it has missed events: a snapshot is needed
    asked: float = float("-inf")  # when one was asked for


class Beliefs:
    """Of one router. ``ttl_s`` None: the trees follow the pools' events."""

    def __init__(self, block_size: int, caching: Caching, ttl_s: float | None):
        self.caching = caching
        self.predictions = Predictions()
        self.tree, self._promised = PromptTree(block_size), PromptTree(block_size)
        self._block_size, self._ttl_s = block_size, ttl_s
        self._beliefs: dict[str, _Belief] = {}
        self._expired = float("-inf")

    def join(self, instance: str) -> None:
        """A new instance, or a new life: nothing is known of its cache."""
        self.tree.join(instance)
        self._promised.join(instance)
        feed = EventFeed(self.tree, instance) if self._ttl_s is None else self._learner(instance)
        self._beliefs[instance] = _Belief(feed, TtlFeed(self._promised, instance, PROMISE_S, PROMISED_BLOCKS))

    def leave(self, instance: str) -> None:
        """The instance holds nothing any more."""
        belief = self._beliefs.pop(instance)
        belief.feed.close()
        belief.promised.close()
        self.tree.leave(instance)
        self._promised.leave(instance)

    def packed(self, tokens: Sequence[int]) -> bytes:
        """The whole blocks of a prompt, as the trees want them. This is a good part of a decision's time."""
        return pack(tokens, len(tokens) // self._block_size * self._block_size)

    def held(
        self, raw: bytes, tokens: int, salt: str, now: float
    ) -> tuple[Mapping[str, Holding], Mapping[str, Holding]]:
        """What each instance holds of a packed prompt of so many tokens now, and when it is a newcomer's turn there.

        What is still to be computed is no reason to ask for it: only the first could be sent to others.
        """
        blocks = (tokens - 1) // self._block_size
        if blocks <= 0:
            return {}, {}
        self._expire(now)
        held = self.tree.match(raw, salt, blocks)
        coming = {} if self.caching is Caching.NONE else self._promised.match(raw, salt, blocks)
        more = {name: found for name, found in coming.items() if name not in held or held[name].blocks < found.blocks}
        if not more:
            return held, held
        later = dict(held)
        for name, found in more.items():
            later[name] = Holding(found.blocks, held[name].dram if name in held else 0)
        return held, later

    def promise(self, instance: str, raw: bytes, salt: str, now: float) -> None:
        """The instance is going to compute this packed prompt."""
        if self.caching is not Caching.NONE and raw:
            self._beliefs[instance].promised.learn(raw, salt, now)

    def withdraw(self, instance: str, raw: bytes, salt: str, others: Iterable[bytes]) -> None:
        """The instance will not compute this packed prompt after all, but ``others``, which may begin like it."""
        step = self._promised.step
        kept = max((shared_blocks(raw, 0, len(raw), other, 0, step) for other in others), default=0)
        self._beliefs[instance].promised.unlearn(raw, salt, kept)

    def learn(self, instance: str, role: Role, tokens: Sequence[int], salt: str, now: float) -> None:
        """A response shows that the instance has computed these tokens (where nothing better tells what it holds)."""
        feed = self._beliefs[instance].feed
        if isinstance(feed, TtlFeed) and self.caching.keeps(role):
            feed.learn(self.packed(tokens), salt, now)

    def on_events(self, instance: str, events: Sequence[Stored | Removed], now: float) -> bool:
        """What a pool tells of its cache; False: something is missing, ask for a snapshot."""
        belief = self._beliefs.get(instance)
        if belief is None or isinstance(belief.feed, TtlFeed):
            return True
        if not belief.stale and belief.feed.apply(events):
            return True
        belief.stale = True
        return not self._may_ask(belief, now)

    def on_snapshot(self, instance: str, snapshot: Snapshot, first: bool, last: bool) -> None:
        """All that an instance holds, in parts."""
        belief = self._beliefs.get(instance)
        if belief is None or isinstance(belief.feed, TtlFeed):
            return
        if first:
            belief.feed.restore(snapshot)
        else:
            belief.feed.extend(snapshot)
        if last:
            belief.stale, belief.wrong = False, 0

    def compare(self, instance: str, predicted: int, cached: int, prompt: int) -> None:
        """Count a prediction, which was that this instance had, or could send, so many tokens, against the truth."""
        totals, belief = self.predictions, self._beliefs.get(instance)
        totals.requests += 1
        totals.prompt_tokens += prompt
        totals.predicted_tokens += predicted
        totals.cached_tokens += cached
        totals.over_tokens += max(0, predicted - cached)
        totals.under_tokens += max(0, cached - predicted)
        if belief is not None:
            over = predicted - cached if self._ttl_s is not None else abs(predicted - cached)
            belief.wrong = belief.wrong + 1 if over > WRONG_TOKENS * prompt else 0

    def wanted(self, now: float) -> list[str]:
        """Instances whose trees are wrong: each is to be asked for a snapshot.

        What was learnt from responses is forgotten instead; that too little was expected is the price of the TTL.
        """
        doubtful = [(n, b) for n, b in self._beliefs.items() if b.stale or b.wrong >= WRONG_IN_A_ROW]
        due = [name for name, belief in doubtful if self._may_ask(belief, now)]
        if self._ttl_s is None:
            return due
        for name in due:
            self._beliefs[name].feed.close()
            self._beliefs[name].feed = self._learner(name)
        return []

    def forget(self) -> None:
        """Every instance has dropped its cache. (Pools tell it too.)"""
        for instance, belief in self._beliefs.items():
            belief.promised.close()
            belief.promised = TtlFeed(self._promised, instance, PROMISE_S, PROMISED_BLOCKS)
            if isinstance(belief.feed, TtlFeed):
                belief.feed.close()
                belief.feed = self._learner(instance)

    def _expire(self, now: float) -> None:
        if now - self._expired < EXPIRE_S:
            return
        self._expired = now
        for belief in self._beliefs.values():
            belief.promised.expire(now)
            if isinstance(belief.feed, TtlFeed):
                belief.feed.expire(now)

    def _learner(self, instance: str) -> TtlFeed:
        assert self._ttl_s is not None
        return TtlFeed(self.tree, instance, self._ttl_s, LEARNT_BLOCKS)

    def _may_ask(self, belief: _Belief, now: float) -> bool:
        """Not too often."""
        if now - belief.asked < RENEW_S:
            return False
        belief.asked, belief.wrong = now, 0
        self.predictions.renewals += 1
        return True

    def check(self) -> None:
        """Assert the trees' invariants. Slow: for tests."""
        self.tree.check()
        self._promised.check()
