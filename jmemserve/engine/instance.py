"""One instance: a thread that turns messages into plans, plans into flights, and flights into events.

    inbox -> plan -> launch -> commit the previous flight -> settle -> events and messages out

One flight is always in the air while there is work: the next step is planned and enqueued before the tokens of the
last one are waited for. Everything that enqueues device work for this instance's mesh happens on this thread.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from jmemserve.config import InstanceSpec, SwapPolicy
from jmemserve.engine.build import Parts
from jmemserve.engine.handover import pack_sequence, unpack_sequence
from jmemserve.engine.messages import Abort, FromPeer, ResetCache, Stop, Submit
from jmemserve.engine.pool_report import pool_report
from jmemserve.engine.runner import Flight
from jmemserve.errors import TransferError
from jmemserve.kvpool import Swap
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.node import PoolNode, Transfer
from jmemserve.scheduler.costs import CostMeter
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.sequence import Sequence, Stamps, State
from jmemserve.types import Event, FinishReason, InstanceLoad, PoolReport, TokenLogprobs, Usage

IDLE_S = 0.05  # how often an idle instance looks at its deadlines
TRANSFER_DEADLINE_S = 30.0
MAX_REMEMBERED_ABORTS = 4096
REMEMBER_ABORT_S = 60.0
REPORT_S = 5.0  # a report that takes longer is given up

Message = object  # one of engine.messages, or a function to call on the instance's thread


class Instance:
    """``send(instance name, message)`` and ``emit(events)`` must not block."""

    def __init__(
        self,
        spec: InstanceSpec,
        parts: Parts,
        send: Callable[[str, Message], None],
        emit: Callable[[str, list[Event]], None],
        on_failure: Callable[[str, BaseException], None],
    ):
        self.spec = spec
        self.pool, self.runner = parts.pool, parts.runner
        self.scheduler = LocalScheduler(parts.pool, parts.shapes, self._leaves)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._emit, self._on_failure = emit, on_failure
        self._send = lambda peer, message: send(peer, FromPeer(spec.name, message))
        self.node = PoolNode(
            parts.pool,
            parts.runner.store,
            parts.arena,
            parts.transports,
            post=self.post,
            send=self._send,
            on_arrival=self._adopt,
            timeout_s=TRANSFER_DEADLINE_S,
            granularity=parts.granularity,
            flags=parts.flags,
        )
        self.compiles: Callable[[], int] = lambda: 0
        self._by_id: dict[str, Sequence] = {}
        self._aborted: dict[str, tuple[float, FinishReason]] = {}  # ids that were not here when they were aborted
        self._moving: dict[str, Sequence] = {}  # by transfer id
        self._steps = 0
        self._costs, self._landed = CostMeter(), 0.0
        self._swap_policy = parts.swap
        self.node.swapper.on_swapped_in = self._costs.swap
        self._events: list[Event] = []
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

    # -- from other threads -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def turn(self) -> None:
        """Handle what has come in, before the thread runs: at start-up, while instances are introduced."""
        assert not self._thread.is_alive(), "the thread is running"
        self._take_messages(wait=False)

    def post(self, message: Message) -> None:
        """Hand a message to the instance."""
        self._inbox.put(message)

    def stop(self) -> None:
        """End the thread; sequences that are left are dropped without an event."""
        self._inbox.put(Stop())
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
        self.node.close()

    def load(self) -> InstanceLoad:
        """A momentary view; the numbers may belong to two neighbouring moments."""
        scheduler, stats = self.scheduler, self.pool.stats()
        return InstanceLoad(
            instance=self.spec.name,
            role=self.spec.role.value,
            running=len(scheduler.running) + len(scheduler.loading),
            waiting=len(scheduler.waiting),
            leaving=len(scheduler.leaving),
            free_blocks=stats.hbm.free,
            cached_blocks=stats.hbm.cached,
            held_blocks=stats.hbm.held + stats.dram.held,
            total_blocks=stats.hbm.capacity,
            prefix_hits=stats.hit_tokens,
            prefix_queries=stats.query_tokens,
            steps=self._steps,
            preemptions=scheduler.preemptions,
            compiles_after_warmup=self.compiles(),
        )

    def report(self) -> PoolReport:
        """All about the pool, as the instance's own thread sees it. Raises TimeoutError if that is too busy."""
        answer: Future[PoolReport] = Future()
        self.post(lambda: answer.set_result(pool_report(self.node)))
        return answer.result(REPORT_S)

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            flight: Flight | None = None
            idle = True  # the last turn neither began nor ended a step: only a message or a deadline can change that
            while self._take_messages(wait=idle):
                now = time.monotonic()
                self._reap(now)
                plan = self.scheduler.plan(now)
                self._swap()  # before the step: what was swapped out must be read before it is written to
                following = self.runner.launch(plan) if plan is not None else None
                idle = flight is None and following is None
                if flight is not None:
                    self._commit(flight)
                flight = following
                self._flush()
        except BaseException as error:  # the one place: a bug must end the process, not hang its clients
            self._on_failure(self.spec.name, error)

    def _take_messages(self, wait: bool) -> bool:
        """Handle what has come in; False when it is time to end. An idle instance waits a moment for more."""
        try:
            message = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                if isinstance(message, Stop):
                    return False
                self._handle(message, time.monotonic())
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _handle(self, message: Message, now: float) -> None:
        match message:
            case Submit():
                self._submit(message, now)
            case Abort():
                self._abort(message, now)
            case ResetCache():
                self.pool.clear()
            case FromPeer():
                self._on_peer(message.peer, message.message)
            case _ if callable(message):
                message()
            case _:
                raise AssertionError(f"{self.spec.name} got {message!r}")

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._emit(self.spec.name, events)

    # -- requests ---------------------------------------------------------------------------------------------

    def _submit(self, message: Submit, now: float) -> None:
        request = message.request
        seq = Sequence(request, list(request.prompt), message.decode, stamps=Stamps(arrival=request.arrival))
        self.scheduler.submit(seq)
        if not self._was_aborted(seq):
            self._by_id[request.id] = seq

    def _abort(self, message: Abort, now: float) -> None:
        seq = self._by_id.get(message.request_id)
        if seq is None:
            self._aborted[message.request_id] = now, message.reason
            return
        self._end(seq, message.reason)

    def _was_aborted(self, seq: Sequence) -> bool:
        """Was a sequence that just came in aborted while it was on its way? Then it has ended."""
        found = self._aborted.pop(seq.request.id, None)
        if found is not None:
            self._by_id[seq.request.id] = seq
            self._end(seq, found[1])
        return found is not None

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence from whatever state, giving back every block."""
        for transfer_id in [key for key, other in self._moving.items() if other is seq]:
            del self._moving[transfer_id]
            self.node.abort(transfer_id)
        self.scheduler.finish(seq)
        self._finished(seq, reason)

    def _finished(self, seq: Sequence, reason: FinishReason, token: Event | None = None) -> None:
        del self._by_id[seq.request.id]
        prompt = len(seq.request.prompt)
        usage = Usage(prompt, len(seq.tokens) - prompt, seq.cached_tokens)
        self._events.append(
            Event(
                seq.request.id,
                token.tokens if token else (),
                token.logprobs if token else (),
                finish=reason,
                usage=usage,
                timings=seq.stamps.timings(),
            )
        )

    def _reap(self, now: float) -> None:
        """End what is past its deadline: requests, transfers, remembered aborts."""
        for seq in [seq for seq in self._by_id.values() if seq.request.deadline and now > seq.request.deadline]:
            self._end(seq, FinishReason.DEADLINE)
        self.node.poll(now)
        while self._aborted:
            oldest = next(iter(self._aborted))
            if len(self._aborted) <= MAX_REMEMBERED_ABORTS and now - self._aborted[oldest][0] < REMEMBER_ABORT_S:
                break
            del self._aborted[oldest]

    # -- steps ------------------------------------------------------------------------------------------------

    def _commit(self, flight: Flight) -> None:
        tokens, described = flight.read()
        now = time.monotonic()
        self._steps += 1
        self._weigh(flight, now)
        rows = {id(piece.sequence): row for row, piece in enumerate(flight.plan.slices)}
        for seq, token, finish in self.scheduler.commit(flight.plan, tokens, now):
            logprobs: tuple[TokenLogprobs, ...] = ()
            about = described[rows[id(seq)]]
            if about is not None and token >= 0:
                logprobs = (about,)
            event = Event(seq.request.id, (token,) if token >= 0 else (), logprobs)
            if finish is not None:
                self._finished(seq, finish, token=event)
                continue
            self._events.append(event)
            if seq.state is State.LEAVING:
                self._flush()  # the receiver's events must not overtake this token
                self._hand_over(seq, now)

    def _weigh(self, flight: Flight, now: float) -> None:
        """Learn what computing costs from steps that are mostly of prompts, and see if swapping is worth it."""
        began, self._landed = max(flight.launched, self._landed), now
        tokens = sum(piece.length for piece in flight.plan.slices)
        if tokens >= 4 * len(flight.plan.slices):
            self._costs.step(tokens, now - began)
        if self._swap_policy is SwapPolicy.AUTO:
            self.scheduler.swap_costs = self._costs.costs()
            self.pool.swaps.enabled = self.scheduler.swap_costs.worth(1, self.pool.block_size)

    # -- between media ----------------------------------------------------------------------------------------

    def _swap(self) -> None:
        """Enqueue the copies that the plan asks for; who waits for one runs when it is over."""
        swaps, self.scheduler.swaps_in = self.scheduler.swaps_in, []
        for swap in swaps:
            self.node.when_over([swap], functools.partial(self._swapped, swap))
        self.node.flush()

    def _swapped(self, swap: Swap, error: Exception | None) -> None:
        self.scheduler.loaded(swap, error is None)

    # -- moving a sequence away -------------------------------------------------------------------------------

    def _leaves(self, seq: Sequence) -> bool:
        """A prefill-only instance lets go as soon as there is nothing left to catch up with."""
        return not self.spec.role.decodes and not seq.stays and not seq.full and seq.decode_hint != self.spec.name

    def _hand_over(self, seq: Sequence, now: float) -> None:
        """Offer a sequence whose tokens are all computed but the last to the instance that is to decode it."""
        assert seq.decode_hint is not None and seq.landed == len(seq.tokens) - 1, (seq.decode_hint, seq.landed)
        seq.stamps.left = now
        tokens, private = seq.tokens[: seq.landed], pack_sequence(seq)
        blocks = self.scheduler.hand_blocks_over(seq)
        moving = self.node.transfer_with_insert(
            seq.decode_hint, tokens, blocks, flags=tx.Flags.CLAIM, private=private, salt=seq.request.salt
        )
        self.pool.free_mem(blocks)  # the transfer holds them
        self._moving[moving.transfer_id] = seq
        moving.future.add_done_callback(lambda _: self._moved(moving))

    def _moved(self, moving: Transfer) -> None:
        """A move has ended. If it failed, this instance goes on: any instance can catch up any sequence."""
        seq = self._moving.pop(moving.transfer_id, None)
        if seq is None:
            return  # it was aborted
        if moving.future.exception() is None:
            del self._by_id[seq.request.id]
            self.scheduler.leave(seq)
        else:
            self.scheduler.stay(seq)

    # -- taking a sequence in ---------------------------------------------------------------------------------

    def _on_peer(self, peer: str, message: tx.Message) -> None:
        # Whoever waits here for blocks is older than a newcomer: nobody is adopted before it has got them.
        crowded = bool(self.scheduler.waiting) or len(self._by_id) >= 2 * self.scheduler.max_seqs
        if isinstance(message, tx.Offer) and message.flags & tx.Flags.CLAIM and crowded:
            self._send(peer, tx.Refuse(message.transfer_id, "too many sequences"))
        else:
            self.node.handle(peer, message)

    def _adopt(self, arrived: tx.Arrived) -> None:
        """Every block is in place: go on with the sequence here."""
        try:
            seq = unpack_sequence(arrived.private, arrived.tokens or (), self.spec.name)
        except TransferError:
            self.pool.free_mem(arrived.blocks)
            raise
        seq.stamps.adopted = time.monotonic()
        self.scheduler.adopt(seq, list(arrived.blocks), len(arrived.tokens or ()))
        self._swap()
        if not self._was_aborted(seq):
            self._by_id[seq.request.id] = seq
