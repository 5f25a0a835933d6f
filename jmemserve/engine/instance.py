"""One instance: a thread that owns a mesh, a pool, a scheduler and a runner.

    inbox -> plan -> launch -> commit the flight before -> settle -> events and messages out

One flight is always in the air while there is work: the next step is planned and enqueued before the tokens of the
last one are waited for. Everything that enqueues device work for this instance's mesh happens on this thread.
"""

import functools
import threading
import time
from collections.abc import Callable

from jmemserve.config import InstanceSpec, Role
from jmemserve.engine.aborts import Aborts
from jmemserve.engine.build import Parts
from jmemserve.engine.compiles import CompileCounter
from jmemserve.engine.frontends import Frontends
from jmemserve.engine.hosttime import HostClock
from jmemserve.engine.mailbox import Mailbox
from jmemserve.engine.messages import FromPeer, Stop
from jmemserve.engine.moves import Moves
from jmemserve.engine.outbox import Outbox, described
from jmemserve.engine.pool_report import load_report, pool_report
from jmemserve.engine.probing import Prober
from jmemserve.engine.returns import Returns
from jmemserve.engine.runner import Flight
from jmemserve.engine.sharing import Sharing
from jmemserve.engine.weighing import Weigher
from jmemserve.errors import TransferError
from jmemserve.kvpool import Swap
from jmemserve.kvpool import transfer as tx
from jmemserve.kvpool.node import PoolNode
from jmemserve.scheduler import messages as m
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.rules import is_crowded, wants_to_leave
from jmemserve.scheduler.sequence import Sequence, Stamps, State
from jmemserve.types import FinishReason, InstanceLoad, TokenLogprobs

IDLE_S = 0.05  # how often an idle instance looks at its deadlines
TRANSFER_DEADLINE_S = 30.0


class Instance:
    """``send(peer, message)`` and ``say(message)``, to the home front-end, must not block; ``linked(peer)``: is it?"""

    def __init__(
        self,
        spec: InstanceSpec,
        parts: Parts,
        send: Callable[[str, tx.Message], None],
        linked: Callable[[str], bool],
        say: Callable[[m.FromInstance], None],
        on_failure: Callable[[BaseException], None],
        compiles: CompileCounter,
    ):
        self.spec, self.role = spec, spec.role
        self.pool, self.runner = parts.pool, parts.runner
        self.scheduler = LocalScheduler(parts.pool, parts.shapes, self._leaves, self._retire)
        self._mailbox = Mailbox(spec.name)
        self.post, self.call = self._mailbox.post, self._mailbox.call
        self._send, self._say, self._on_failure = send, say, on_failure
        self.frontends = Frontends(parts.pool, say, self._drop_unawaited)
        self.node = PoolNode(
            parts.pool,
            parts.runner.store,
            parts.arena,
            parts.transports,
            post=self.post,
            send=send,
            on_arrival=self._adopt,
            timeout_s=TRANSFER_DEADLINE_S,
            granularity=parts.granularity,
            flags=parts.flags,
        )
        self.compiles = compiles
        self.on_roster: Callable[[m.Roster], None] = lambda roster: None
        self.drop_link: Callable[[str], None] = lambda peer: None
        self._by_id: dict[str, Sequence] = {}
        self._aborts = Aborts()
        self._steps, self._rank = 0, 0.0
        self.costs = Weigher(self.scheduler, parts.swap, parts.profile, self.frontends.tell_all)
        self._caching, self._shapes_of = parts.caching, parts.shapes_of
        self.pool.caching = parts.caching.keeps(self.role)
        self.node.swapper.on_swapped_in, self.node.on_moved = self.costs.swapped_in, self.costs.took_in
        self._moves = Moves(spec.name, self.node, self.scheduler, self._gone)
        self._returns = Returns(self.node)
        self._sharing = Sharing(self.node, self.frontends.shared)
        self._prober = Prober(self.node, say, linked)
        self._epochs: dict[str, int] = {}  # of the roster's members
        self._leaving = False
        self._outbox = Outbox(self.frontends)
        self._turned, self._host = time.monotonic(), HostClock()
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

    # -- from other threads -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def stalled_s(self) -> float:
        """Seconds since the thread came round last."""
        return time.monotonic() - self._turned

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; sequences that are left are dropped without an event."""
        self.post(Stop())
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
        self.node.close()

    def load(self) -> InstanceLoad:
        """A momentary view; the numbers may belong to two neighbouring moments."""
        costs, host = self.costs.error, self._host.times()
        return load_report(self.spec.name, self.role, self.scheduler, self._steps, self.compiles, costs, host)

    def beat(self, frontend: str) -> m.Beat:
        """The sign of life of this moment for a front-end."""
        others = sum(m.frontend_of(request_id) != frontend for request_id in list(self._by_id))
        return m.Beat(self.load(), self.stalled_s, others, self._rank)

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            flight: Flight | None = None
            idle = True  # the last turn neither began nor ended a step: only a message or a deadline can change that
            while self._take_messages(wait=idle):
                now = self._turned = time.monotonic()
                self._reap(now)
                following = self._launch(now, flight)
                idle = flight is None and following is None
                if flight is not None:
                    self._commit(flight)
                flight = following
                self._outbox.flush()
                if following is None:
                    self._host.rest()
        except BaseException as error:  # the one place: a bug must end the process, not hang its clients
            self._on_failure(error)

    def _take_messages(self, wait: bool) -> bool:
        """Handle what has come in; False when it is time to end. An idle instance waits a moment for more."""
        message = self._mailbox.take(IDLE_S if wait else 0)
        while message is not None:
            if isinstance(message, Stop):
                return False
            self._handle(message, time.monotonic())
            message = self._mailbox.take(0)
        return True

    def _handle(self, message: object, now: float) -> None:
        match message:
            case FromPeer():
                self._on_peer(message.peer, message.message)
            case m.Submit():
                self._submit(message, now)
            case m.Abort():
                self._abort(message, now)
            case m.Move():
                self._move(message)
            case m.Share():
                self._sharing.share(message)
            case m.AskCache():
                self.frontends.tell_cache(message.frontend)
            case m.Roster():
                self._on_roster(message)
            case m.Probe():
                self._prober.begin(message.peer, message.thorough, now)
            case m.ResetCache():
                self.pool.clear()
            case m.ChangeRole():
                self._change_role(message.role)
            case m.AskPool():
                self.frontends.answer(message.frontend, m.PoolNews(pool_report(self.node)))
            case m.Leave():
                self._leaving = True
            case _ if callable(message):
                message()
            case _:
                raise AssertionError(f"{self.spec.name} got {message!r}")

    # -- requests ---------------------------------------------------------------------------------------------

    def _submit(self, message: m.Submit, now: float) -> None:
        request = message.request
        if request.id in self._by_id:
            return  # it came twice
        stamps = Stamps(arrival=request.arrival, first_token=message.first_token)
        seq = Sequence(request, [*request.prompt, *message.generated], message.decode, stamps=stamps)
        self.scheduler.submit(seq)
        if not self._was_aborted(seq):
            self._by_id[request.id] = seq

    def _abort(self, message: m.Abort, now: float) -> None:
        seq = self._by_id.get(message.request_id)
        if seq is None:
            self._aborts.remember(message.request_id, message.reason, now)
            return
        self._end(seq, message.reason)

    def _was_aborted(self, seq: Sequence) -> bool:
        """Was a sequence that just came in given up while it was on its way? Then it has ended."""
        reason = self._aborts.take(seq.request.id)
        if not self.frontends.awaits(seq.request.id):
            reason = FinishReason.ABORT
        if reason is not None:
            self._by_id[seq.request.id] = seq
            self._end(seq, reason)
        return reason is not None

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence from whatever state, giving back every block."""
        if reason is FinishReason.STOP and seq.state is State.RUNNING:
            self._retire(seq)
        self._moves.give_up(seq)
        self.scheduler.finish(seq)
        del self._by_id[seq.request.id]
        self._outbox.end(seq, reason)

    def _reap(self, now: float) -> None:
        """End what is past its deadline: requests, transfers, remembered aborts; and leave, when all is done."""
        for seq in [seq for seq in self._by_id.values() if seq.request.deadline and now > seq.request.deadline]:
            self._end(seq, FinishReason.DEADLINE)
        self.node.poll(now)
        self._prober.poll(now)
        self.frontends.poll(now)
        if self._leaving and not self._by_id and not self._returns:
            self._leaving = False
            self.frontends.tell_all(m.Left())
        self._aborts.expire(now)

    # -- steps ------------------------------------------------------------------------------------------------

    def _launch(self, now: float, before: Flight | None) -> Flight | None:
        """Plan a step and enqueue it; ``before`` is in the air. None if there is nothing to compute."""
        began = time.monotonic()
        plan = self.scheduler.plan(now)
        self._swap()  # before the step: what was swapped out must be read before it is written to
        if plan is None:
            return None
        plan_s = time.monotonic() - began
        flight = self.runner.launch(plan)
        self._host.launched(flight, plan_s, before)
        return flight

    def _commit(self, flight: Flight) -> None:
        tokens, entries = flight.read()
        now = time.monotonic()
        self._host.landed(now)
        self._steps += 1
        self.costs.step(flight, now)
        column = self.scheduler.commit_repeated(flight.plan, tokens, now) if entries is None else None
        if column is not None:
            self._outbox.column(column)
        else:
            self._take_in(flight, tokens, entries, now)
        self._host.committed(time.monotonic() - now)

    def _take_in(
        self, flight: Flight, tokens: list[int], entries: list[TokenLogprobs | None] | None, now: float
    ) -> None:
        """The result of a step in which anything may have happened."""
        about, gained = described(flight, entries), list[tuple[Sequence, int]]()
        for seq, token, finish in self.scheduler.commit(flight.plan, tokens, now):
            if seq.request.rank > self._rank:
                self._rank = seq.request.rank
            if finish is None:
                gained.append((seq, token))
            else:
                del self._by_id[seq.request.id]
                self._outbox.end(seq, finish, token if token >= 0 else None, about.get(id(seq)))
        self._outbox.tokens(gained, about)
        for seq, _ in gained:
            if seq.state is State.LEAVING and not seq.promised:  # else the step that it leaves after is in the air
                self._moves.hand_over(seq, seq.origin if self.role.decodes else self.spec.name, now)

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
        known = self.node.peers.known
        return wants_to_leave(seq, self.role, self.spec.name) and known(str(seq.decode_hint)) is not None

    def _move(self, message: m.Move) -> None:
        seq = self._by_id.get(message.request_id)
        if seq is not None:
            seq.decode_hint, seq.moving = message.to, message.to != self.spec.name
            self.scheduler.reconsider()

    def _gone(self, seq: Sequence) -> None:
        del self._by_id[seq.request.id]

    def _retire(self, seq: Sequence) -> None:
        """A sequence has ended well: what was made here may go back to where its prompt was computed."""
        if self._caching.returns and self.pool.caching:
            self._returns.send(seq)

    # -- taking a sequence in ---------------------------------------------------------------------------------

    def _on_peer(self, peer: str, message: tx.Message) -> None:
        # Those who wait here get blocks first. A newcomer of whatever rank loses nothing: it goes on where it is.
        crowded = is_crowded(self.scheduler, len(self._by_id))
        if isinstance(message, tx.Offer) and message.flags & tx.Flags.CLAIM and (crowded or self._leaving):
            if self.node.peers.known(peer) is not None:
                self._send(peer, tx.Refuse(message.transfer_id, "too many sequences"))
        else:
            self.node.handle(peer, message)

    def _adopt(self, arrived: tx.Arrived) -> None:
        """Every block is in place: go on with the sequence here. Raises TransferError if it is not taken."""
        seq = self._moves.take_in(arrived, time.monotonic())
        if seq.request.id in self._by_id:  # it has come back before its former stay here was over
            self.pool.free_mem(arrived.blocks)
            raise TransferError(f"{seq.request.id} is here already")
        self.scheduler.adopt(seq, list(arrived.blocks), len(arrived.tokens or ()))
        self._swap()
        if not self._was_aborted(seq):
            self._by_id[seq.request.id] = seq

    # -- the cluster ------------------------------------------------------------------------------------------

    def greet(self, hello: tx.Hello) -> str:
        """Link up with a member in the life that the newest roster knows; its name. Raises TransferError."""
        if self._epochs.get(hello.instance) != hello.epoch:
            raise TransferError(f"{hello.instance} in epoch {hello.epoch} is not in {self.spec.name}'s roster")
        return self.node.greet(hello).name

    def _on_roster(self, roster: m.Roster) -> None:
        """Who is there: what those have here that are not, or not in the same life, is freed (paper section 4.4)."""
        epochs = self._epochs = {member.name: member.epoch for member in roster.members}
        for peer in self.node.peers.names():
            known = self.node.peers.known(peer)
            if known is not None and epochs.get(peer, known.epoch + 1) > known.epoch:
                self._forget(peer)
        state = next((member.state for member in roster.members if member.name == self.spec.name), None)
        if state is m.MemberState.READY and self.frontends.ready():
            self.node.tally.reset()  # what moved so far was probes
        self.on_roster(roster)

    def _forget(self, peer: str) -> None:
        """Free what a peer has here, and end the link: should it be alive after all, they greet each other anew."""
        self._prober.forget(peer)
        self.node.forget_peer(peer)
        self.drop_link(peer)

    def _drop_unawaited(self) -> None:
        """A front-end is gone: nobody waits for what it has asked for."""
        for seq in [seq for seq in self._by_id.values() if not self.frontends.awaits(seq.request.id)]:
            self._end(seq, FinishReason.ABORT)

    def begin_life(self, epoch: int) -> None:
        """The cluster held this instance for dead: drop every sequence and every claim of others; the cache stays.

        To be called on the instance's thread. Raises Unavailable while blocks are still being written.
        """
        for seq in list(self._by_id.values()):
            self._moves.give_up(seq)
            self.scheduler.finish(seq)
        self._by_id.clear()
        self._aborts.clear()
        self._outbox.clear()
        for peer in list(self.node.peers.names()):
            self._forget(peer)
        self._epochs = {}
        self._leaving = False
        self.frontends.clear()
        self.pool.begin_life(epoch)

    def _change_role(self, role: Role) -> None:
        """Prefer something else, once all shapes of that role are compiled, beside the steps of the present one."""
        shapes = tuple(sorted({*self._shapes_of(role), *self.runner.shapes}))

        def compile_and_take() -> None:
            with self.compiles.excused():
                self.runner.add_shapes(shapes)
            self.post(functools.partial(self._take_role, role))

        threading.Thread(target=compile_and_take, name=f"{self.spec.name}-compile", daemon=True).start()

    def _take_role(self, role: Role) -> None:
        self.role = role
        self.pool.caching = self._caching.keeps(role)
        self.scheduler.take_shapes(self._shapes_of(role))
