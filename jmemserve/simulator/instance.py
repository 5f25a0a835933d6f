"""One modelled instance: the loop of ``engine.instance`` with its real scheduler, pool, moves and returns.

One flight is in the air while the next step is planned, as there. A step takes what the cost model says and samples
made-up tokens, which depend on the request's seed and the place alone. Of a sequence's tokens the front-end hears at
once of the first, and of the others when it ends or leaves: nothing that routes looks at more.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from jmemserve.config import EngineConfig, InstanceSpec, PromptTrees, SwapPolicy
from jmemserve.engine.cache_news import CacheTeller
from jmemserve.engine.messages import FromPeer
from jmemserve.engine.moves import Moves
from jmemserve.engine.returns import Returns
from jmemserve.engine.sharing import Sharing
from jmemserve.errors import TransferError
from jmemserve.kvpool import BlockPool, Swap
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.events import EventLog
from jmemserve.kvpool.swaps import WRITE_BACK_BELOW, WRITE_BACK_BLOCKS
from jmemserve.scheduler import messages as m
from jmemserve.scheduler.cost_model import CostModel
from jmemserve.scheduler.costs import CostMeter
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import Plan, step_shapes
from jmemserve.scheduler.rules import is_crowded, teaches_prefill, wants_to_leave
from jmemserve.scheduler.sequence import Sequence, Stamps, State
from jmemserve.simulator import ahead
from jmemserve.simulator.clock import Clock, Device, Host
from jmemserve.simulator.load import made_up
from jmemserve.simulator.node import Network, SimNode
from jmemserve.types import Event, FinishReason, Usage

IDLE_S = 0.05  # how often an idle instance comes round while it has something to tell of its cache


@dataclasses.dataclass(slots=True, eq=False)
class _Flight:
    """A step in the air."""

    plan: Plan
    launched: float  # when
    over: bool = False


class SimInstance:
    """``blocks``: of its pool, in HBM and in DRAM; ``say(message)``: to the front-end."""

    def __init__(
        self,
        spec: InstanceSpec,
        engine: EngineConfig,
        blocks: tuple[int, int],
        costs: CostModel,
        network: Network,
        host: Host,
        say: Callable[[m.FromInstance], None],
    ):
        self.spec, self.costs = spec, costs
        self._clock: Clock = network.clock
        self._engine, self._say, self._has_dram = engine, say, blocks[1] > 0
        self.device = Device(host, self._clock)
        self.pool = BlockPool(spec.name, 1, blocks[0], engine.block_size, blocks[1], log=EventLog())
        self.pool.caching = engine.caching.keeps(spec.role)
        role, most = spec.role, (engine.max_num_seqs, engine.max_num_batched_tokens)
        shapes = step_shapes(role.decodes, role.prefills, *most)
        self.scheduler = LocalScheduler(self.pool, shapes, self._leaves, self._retire)
        self.node = SimNode(self.pool, network, self.device, costs, self.post, self._adopt)
        self._moves = Moves(spec.name, self.node, self.scheduler, self._gone)
        self._returns, self._sharing = Returns(self.node), Sharing(self.node, say)
        self._teller = CacheTeller(self.pool, say)
        if engine.prompt_trees is PromptTrees.EVENTS:
            self._teller.begin()
        self._meter, self._landed, self._swapped_until = CostMeter(), 0.0, 0.0
        self._inbox: list[object] = []
        self._by_id: dict[str, Sequence] = {}
        self._told: dict[str, int] = {}  # how many tokens of each sequence the front-end has heard of
        self._events: list[Event] = []
        self._flight: _Flight | None = None
        self._waited: _Flight | None = None  # the loop goes on when it is over
        self._stretch: ahead.Stretch | None = None  # steps that are worked out at once, under way
        self._idle = True  # else a turn is due, or a step that it waits for
        self.steps = 0
        self.computed = 0  # tokens, of all steps
        network.inboxes[spec.name] = self.post

    def post(self, message: object) -> None:
        """Put something into the inbox; an idle instance comes round at once."""
        self._inbox.append(message)
        if self._idle:
            self._clock.at(self._clock.now, self._wake)
        elif self._stretch is not None and self._stretch.cut(self._clock.now):
            self._await_stretch(self._stretch)

    def _wake(self) -> None:
        if self._idle:
            self._idle = False
            self._turn()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        while True:
            now = self._clock.now
            self._take_messages(now)
            self._write_back()
            self._teller.poll(now)
            if self._flight is not None and (stretch := self._ahead(self._flight)) is not None:
                self._stretch = stretch
                self._await_stretch(stretch)
                return
            plan = self.scheduler.plan(now)
            self._swap()
            following = self._launch(plan, now) if plan is not None else None
            before, self._flight = self._flight, following
            if before is not None:
                if not before.over:
                    self._waited = before
                    return
                self._commit(before)
            self._flush()
            if before is None and following is None:
                if not self._inbox:
                    self._idle = True
                    if self._teller.behind:
                        self._clock.at(now + IDLE_S, self._wake)
                    return

    def _launch(self, plan: Plan, now: float) -> _Flight:
        flight = _Flight(plan, now)
        seconds = self.costs.rows_s(plan.shape, [(piece.start, piece.length) for piece in plan.slices])
        self.device.enqueue(seconds, functools.partial(self._over, flight))
        return flight

    def _ahead(self, flight: _Flight) -> ahead.Stretch | None:
        """The steps that may be worked out at once, if nothing else is to be done."""
        end = self.device.ends
        busy = self._inbox or self._teller.behind or self._has_dram and self._lacks_room
        if flight.over or end is None or busy:
            return None
        return ahead.find(self.scheduler, flight.plan, self.costs, end)

    def _await_stretch(self, stretch: ahead.Stretch) -> None:
        self._clock.at(stretch.ends[-1], self._end_stretch, stretch, stretch.number)

    def _end_stretch(self, stretch: ahead.Stretch, number: int) -> None:
        """All its steps have ended, the last one just now: go on where the loop would be."""
        if number != stretch.number:
            return  # it was cut meanwhile
        self._stretch, now, ends = None, self._clock.now, stretch.ends
        for before, end in itertools.pairwise(ends):
            self.device.busy_s += end - before
        self.steps += len(ends)
        self.computed += len(ends) * len(stretch.plan.slices)
        self._landed = now
        self._flight = self._launch(stretch.apply(self.scheduler), now)
        self._turn()

    def _over(self, flight: _Flight) -> None:
        """A step has ended; the loop may have waited for it."""
        flight.over = True
        if self._waited is flight:
            self._waited = None
            self._commit(flight)
            self._flush()
            self._turn()

    def _take_messages(self, now: float) -> None:
        while self._inbox:
            messages, self._inbox = self._inbox, []
            for message in messages:
                match message:
                    case FromPeer():
                        self._on_peer(message.peer, message.message)
                    case m.Submit():
                        self._submit(message)
                    case m.Abort():
                        self._abort(message)
                    case m.Move():
                        self._move(message)
                    case m.Share():
                        self._sharing.share(message)
                    case m.AskCache():
                        self._teller.begin()
                    case _ if callable(message):
                        message()
                    case _:
                        raise AssertionError(f"{self.spec.name} got {message!r}")

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._say(m.News(tuple(events)))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _submit(self, message: m.Submit) -> None:
        request = message.request
        stamps = Stamps(arrival=request.arrival, first_token=message.first_token)
        seq = Sequence(request, [*request.prompt, *message.generated], message.decode, stamps=stamps)
        self.scheduler.submit(seq)
        self._by_id[request.id], self._told[request.id] = seq, len(message.generated)

    def _abort(self, message: m.Abort) -> None:
        seq = self._by_id.get(message.request_id)
        if seq is not None:
            self._moves.give_up(seq)
            self.scheduler.finish(seq)
            self._tell(seq, message.reason)

    def _move(self, message: m.Move) -> None:
        seq = self._by_id.get(message.request_id)
        if seq is not None:
            seq.decode_hint, seq.moving = message.to, message.to != self.spec.name
            self.scheduler.reconsider()

    def _commit(self, flight: _Flight) -> None:
        now, plan = self._clock.now, flight.plan
        self.steps += 1
        self._weigh(flight, now)
        sampled = [made_up(p.sequence.request.seed, p.start + p.length) for p in plan.slices]
        if self.scheduler.commit_repeated(plan, sampled, now) is not None:
            return  # the front-end hears of it with what comes next
        told = self._told
        for seq, _, finish in self.scheduler.commit(plan, sampled, now):
            if finish is not None:
                self._tell(seq, finish)
            elif seq.state is State.LEAVING and not seq.promised:
                self._tell(seq)
                origin = seq.origin if self.spec.role.decodes else self.spec.name
                self._moves.hand_over(seq, origin, now)
            elif not told[seq.request.id]:
                self._tell(seq)

    def _tell(self, seq: Sequence, finish: FinishReason | None = None) -> None:
        """Let the front-end hear of all that it has not heard of."""
        request = seq.request
        prompt, start = len(request.prompt), self._told[request.id]
        made = len(seq.tokens) - prompt
        event = Event(request.id, tuple(seq.tokens[prompt + start :]), start=start)
        if finish is None:
            self._told[request.id] = made
        else:
            usage = Usage(prompt, made, seq.cached_tokens)
            event = dataclasses.replace(event, finish=finish, usage=usage, timings=seq.stamps.timings())
            self._forget(seq)
        self._events.append(event)

    def _forget(self, seq: Sequence) -> None:
        del self._by_id[seq.request.id], self._told[seq.request.id]

    def _weigh(self, flight: _Flight, now: float) -> None:
        """As the real one learns whether swapping is worth it."""
        began, self._landed = max(flight.launched, self._landed), now
        tokens = flight.plan.num_tokens
        self.computed += tokens
        if not self._has_dram:
            return
        if teaches_prefill(flight.plan):
            self._meter.step(tokens, now - began)
        if self._engine.swap is SwapPolicy.AUTO:
            self.scheduler.swap_costs = self._meter.costs()
            self.pool.swaps.enabled = self.scheduler.swap_costs.worth(1, self.pool.block_size)

    # -- between media ------------------------------------------------------------------------------------------------

    def _write_back(self) -> None:
        if self._has_dram and self._lacks_room:
            self.pool.write_back(WRITE_BACK_BLOCKS)

    @property
    def _lacks_room(self) -> bool:
        return self.pool.reclaimable < WRITE_BACK_BELOW * self.pool.capacity

    def _swap(self) -> None:
        """Begin the copies that were ordered; one after the other goes over the host's bus, after what is enqueued."""
        if not self._has_dram:
            return
        self.scheduler.swaps_in.clear()
        for swap in self.pool.swaps.take():
            self.device.enqueue(0.0, functools.partial(self._copy, swap))

    def _copy(self, swap: Swap) -> None:
        start = max(self._clock.now, self._swapped_until)
        self._swapped_until = start + self.costs.swap_in_s(len(swap.hbm))
        seconds = self._swapped_until - start
        self._clock.at(self._swapped_until, self.post, functools.partial(self._copied, swap, seconds))

    def _copied(self, swap: Swap, seconds: float) -> None:
        self.pool.swaps.done(swap)
        if not swap.out:
            self._meter.swap(len(swap.hbm), seconds)
            self.scheduler.loaded(swap, True)

    # -- moving -------------------------------------------------------------------------------------------------------

    def _leaves(self, seq: Sequence) -> bool:
        return wants_to_leave(seq, self.spec.role, self.spec.name)

    def _gone(self, seq: Sequence) -> None:
        self._forget(seq)

    def _retire(self, seq: Sequence) -> None:
        if self._engine.caching.returns and self.pool.caching:
            self._returns.send(seq)

    def _on_peer(self, peer: str, message: tx.Message) -> None:
        claims = isinstance(message, tx.Offer) and message.flags & tx.Flags.CLAIM
        if isinstance(message, tx.Offer) and claims and is_crowded(self.scheduler, len(self._by_id)):
            self.node.send(peer, tx.Refuse(message.transfer_id, "too many sequences"))
        else:
            self.node.handle(message)

    def _adopt(self, arrived: tx.Arrived) -> None:
        """Every block is in place: go on with the sequence here. Raises TransferError if it is not taken."""
        seq = self._moves.take_in(arrived, self._clock.now)
        if seq.request.id in self._by_id:
            self.pool.free_mem(arrived.blocks)
            raise TransferError(f"{seq.request.id} is here already")
        self.scheduler.adopt(seq, list(arrived.blocks), len(arrived.tokens or ()))
        self._by_id[seq.request.id] = seq
        self._told[seq.request.id] = len(seq.tokens) - len(seq.request.prompt)

    def check(self) -> None:
        """Assert that nothing is left behind. Slow: for tests, and for the end of a run."""
        assert not self._by_id and not len(self.node) and not len(self._returns), f"{self.spec.name} is not done"
        assert self.pool.held == 0, f"{self.spec.name} holds {self.pool.held} blocks"
        self.pool.check()
