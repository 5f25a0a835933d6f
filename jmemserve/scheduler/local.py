"""Continuous batching of one instance: which sequences advance by how many tokens in the next step.

There is one counter per sequence, its gap (known - computed). A plan spends a budget of tokens: first on running
sequences that lack one token, then on running ones that lack more, first in order first, then on waiting ones. Who
cannot get a block makes the last running sequence give up its blocks (it waits again and recomputes, mostly from the
prefix cache, or swapped in again). The order is that of ``fairness.order``: by fair share and priority, then by
arrival. It is total and nobody's place in it changes, so the first can always proceed; and since newcomers are ever
further behind, everybody is the first some time: nobody starves. A lower priority gives way for want of blocks only.

What a sequence finds in DRAM is swapped in before it runs, where that costs less than computing it again.

Counters run ahead: a plan made counts as done, and the token it samples is *promised* until ``commit`` learns it.
Pure: no clock, no device; ``now`` is an argument.
"""

import bisect
import itertools
from collections import abc, deque
from collections.abc import Callable, Iterable

from jmemserve.errors import PoolFull
from jmemserve.kvpool import BlockAddress, BlockPool, Medium, Swap
from jmemserve.scheduler.costs import SwapCosts
from jmemserve.scheduler.fairness import order
from jmemserve.scheduler.messages import Tokens
from jmemserve.scheduler.plan import Plan, Slice, StepShape, smallest, trim
from jmemserve.scheduler.sequence import Sequence, State
from jmemserve.scheduler.steady import Steady
from jmemserve.types import INVALID, FinishReason

INDEXED_TOGETHER = 4  # blocks of a sequence that decodes; one look at the index costs much more than a block


class LocalScheduler:
    """The sequences of one instance and their blocks in its pool."""

    def __init__(
        self,
        pool: BlockPool,
        shapes: tuple[StepShape, ...],
        leaves: Callable[[Sequence], bool] = lambda seq: False,
        retires: Callable[[Sequence], None] = lambda seq: None,
    ):
        self.pool = pool
        self.leaves = leaves  # asked right after planning: does the sequence leave once this step has landed?
        self.retires = retires  # told of a sequence that has ended well and still holds its blocks
        self.take_shapes(shapes)
        self.waiting: deque[Sequence] = deque()  # in order
        self.running: list[Sequence] = []  # in order
        self.leaving: list[Sequence] = []
        self.loading: dict[int, Sequence] = {}  # who waits for which swap
        self.swaps_in: list[Swap] = []  # begun since the caller looked last
        self.swap_costs = SwapCosts()
        self.preemptions = 0
        self.plans = 0

    def take_shapes(self, shapes: tuple[StepShape, ...]) -> None:
        """Plan steps of these shapes from now on."""
        self.reconsider()
        self.shapes = shapes
        self.max_tokens = max(shape.tokens for shape in shapes)
        self.max_seqs = max(shape.seqs for shape in shapes)

    def reconsider(self) -> None:
        """What ``leaves`` says may be otherwise now, or a sequence was changed from outside."""
        self._steady: Steady | None = None

    # -- sequences come and go --------------------------------------------------------------------------------

    def submit(self, seq: Sequence) -> None:
        """Take a sequence that holds no blocks."""
        assert seq.state is State.WAITING and not seq.blocks, (seq.state, len(seq.blocks))
        self._queue(seq)

    def adopt(self, seq: Sequence, blocks: list[BlockAddress], computed: int) -> None:
        """Take a sequence whose first ``computed`` tokens are in ``blocks``, which it holds from now on."""
        seq.blocks, seq.table = list(blocks), [block.index for block in blocks]
        seq.computed = seq.landed = computed
        seq.indexed = computed // self.pool.block_size
        seq.first_admission = False
        assert computed <= len(blocks) * self.pool.block_size, (computed, len(blocks))
        self._start(seq)

    def finish(self, seq: Sequence) -> None:
        """Let a sequence go, from whatever state; its blocks are given back at once (indexed ones stay cached).

        Steps in flight may still write into them: whoever gets them next is ordered after those steps.
        """
        if seq.state is State.RUNNING:
            self._index(seq)
        for group in (self.running, self.leaving, self.waiting):
            if seq in group:
                group.remove(seq)
        if seq.state is not State.LOADING:  # else its blocks are being written to: ``loaded`` gives them back
            self._give_back(seq)
        seq.state = State.FINISHED

    def hand_blocks_over(self, seq: Sequence) -> list[BlockAddress]:
        """The blocks of a leaving sequence that hold computed tokens: from now on the caller's. Others are freed."""
        assert seq.state is State.LEAVING, seq.state
        full = -(-seq.landed // self.pool.block_size)
        blocks, surplus = seq.blocks[:full], seq.blocks[full:]
        self.pool.free_mem(surplus)
        seq.blocks, seq.table, seq.turns = [], [], seq.turns + 1
        return blocks

    def leave(self, seq: Sequence) -> None:
        """A sequence whose blocks were handed over lives elsewhere now."""
        self.leaving.remove(seq)
        seq.state = State.FINISHED

    def stay(self, seq: Sequence) -> None:
        """Nobody took a sequence whose blocks were handed over: it is caught up here, mostly from the cache."""
        self.leaving.remove(seq)
        seq.stays, seq.moving, seq.state = True, False, State.WAITING
        seq.computed = seq.landed = seq.indexed = 0
        self._queue(seq)

    def sequences(self) -> Iterable[Sequence]:
        yield from (*self.running, *self.leaving, *self.waiting, *self.loading.values())

    def loaded(self, swap: Swap, arrived: bool) -> None:
        """A swap-in of ``swaps_in`` is over. If the bytes did not arrive, the pool took their blocks back."""
        seq = self.loading.pop(swap.number)
        if not arrived:
            lost = set(swap.hbm)
            seq.blocks = [block for block in seq.blocks if block.index not in lost]
        if seq.state is State.FINISHED:
            self.pool.free_mem(seq.blocks)
            seq.blocks, seq.table = [], []
        elif arrived:
            seq.state = State.RUNNING
            bisect.insort(self.running, seq, key=_order)
        else:
            self._give_back(seq)
            seq.state = State.WAITING
            self._queue(seq)

    # -- the step ---------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when there is nothing to compute. Counts everything in it as done."""
        repeated = self._repeat()
        if repeated is not None:
            return repeated
        self._steady = None
        pieces: list[Slice] = []
        budget = self.max_tokens
        preempted: set[int] = set()
        in_order: tuple[list[Sequence], list[Sequence]] = [], []  # in order within each kind: short gaps, long ones
        for seq in self.running:
            in_order[seq.gap > 1].append(seq)
        size = self.pool.block_size
        for seq in itertools.chain(*in_order):
            gap = seq.gap
            if seq.state is not State.RUNNING or gap == 0 or seq.promised and seq.full:
                continue
            if budget == 0 or len(pieces) == self.max_seqs:
                break
            length = min(gap, budget)
            stop = seq.computed + length
            if stop > len(seq.blocks) * size and not self._make_room(seq, stop, pieces, preempted):
                continue
            pieces.append(_slice(seq, length))
            budget -= length
        while self.waiting and budget and self._active < self.max_seqs and len(pieces) < self.max_seqs:
            seq = self.waiting[0]
            if preempted or not self._admit(seq, now):
                break
            if seq.state is State.LOADING:
                continue
            length = min(seq.gap, budget)
            if not self._make_room(seq, seq.computed + length, (), None):
                self._put_back(seq)
                break
            pieces.append(_slice(seq, length))
            budget -= length
        if not pieces:
            return None
        trim(self.shapes, pieces)
        shape = smallest(self.shapes, [piece.length for piece in pieces])
        assert shape is not None, f"no shape of {self.shapes} holds {[piece.length for piece in pieces]}"
        for row, piece in enumerate(pieces):
            self._advance(piece, row)
        self.plans += 1
        plan = Plan(self.plans, shape, tuple(pieces))
        self._steady = Steady.of(plan, self.running, size)
        return plan

    def commit(self, plan: Plan, sampled: list[int], now: float) -> list[tuple[Sequence, int, FinishReason | None]]:
        """The step has ended and row b sampled ``sampled[b]``. Returns (sequence, token, finish) of those that got one.

        A stop token is not appended and comes back as INVALID. Sequences that end are let go; sequences that gave up
        their blocks since the plan was made keep the token but index nothing. Full blocks enter the index here.
        """
        news: list[tuple[Sequence, int, FinishReason | None]] = []
        for piece, token in zip(plan.slices, sampled, strict=False):
            seq = piece.sequence
            if seq.state is State.FINISHED:
                continue  # its surplus token is dropped
            if piece.samples:
                finish, shown = self._keep_promise(seq, token, now)
            if piece.turn == seq.turns:
                seq.landed = piece.start + piece.length
                self._index(seq)
            if piece.samples:
                if finish is not None:
                    if piece.turn == seq.turns:
                        self.retires(seq)
                    self.finish(seq)
                news.append((seq, shown, finish))
        return news

    def commit_repeated(self, plan: Plan, sampled: list[int], now: float) -> Tokens | None:
        """As ``commit``, if the plan was repeated and each of its rows got a token and goes on. None: it is not so.

        Blocks enter the index ``INDEXED_TOGETHER`` at a time, the last ones when something else happens.
        """
        steady, sampled = self._steady, sampled[: plan.num_rows]
        if steady is None or steady.sequences != self.running or not steady.covers(plan, sampled):
            return None
        for seq, token in zip(steady.sequences, sampled, strict=True):
            seq.tokens.append(token)
            seq.promised -= 1
            seq.landed += 1
            seq.stamps.last_token = now
        together = INDEXED_TOGETHER * self.pool.block_size
        for _, seq in steady.beginning(plan.repeats + 1):  # the next token begins a block: this one filled one
            if seq.landed % together == 0:
                self._index(seq)
        return steady.tokens(plan, sampled)

    # -- steady decoding --------------------------------------------------------------------------------------

    def _repeat(self) -> Plan | None:
        """The plan before once more, each row a token further; None when more than that may have to be done."""
        steady = self._steady
        if steady is None or steady.sequences != self.running or steady.plan.repeats >= steady.last:
            return None
        if self.waiting and self._active < self.max_seqs or steady.sequences[0].promised != 1:
            return None
        size, begin = self.pool.block_size, steady.beginning(steady.plan.repeats + 1)
        lacking = [seq for _, seq in begin if len(seq.blocks) * size <= seq.computed]
        if lacking:
            if len(lacking) > self.pool.room():
                return None
            for seq, block in zip(lacking, self.pool.alloc_mem(len(lacking)), strict=True):
                seq.blocks.append(block)
                seq.table.append(block.index)
        self.plans += 1
        return steady.repeat(self.plans, tuple([(row, seq.table[seq.computed // size]) for row, seq in begin]))

    # -- inside -----------------------------------------------------------------------------------------------

    def _keep_promise(self, seq: Sequence, token: int, now: float) -> tuple[FinishReason | None, int]:
        """The promised token is known. Returns why the sequence ends, if it does, and the token to show."""
        assert seq.promised >= 1, f"{seq.request.id} was promised {seq.promised} tokens and got one"
        seq.promised -= 1
        if not seq.stamps.first_token:
            seq.stamps.first_token = now
        seq.stamps.last_token = now
        if token in seq.request.stop_ids:
            seq.computed = min(seq.computed, len(seq.tokens))
            return FinishReason.STOP, INVALID
        seq.tokens.append(token)
        done = seq.full and not seq.promised
        return (FinishReason.LENGTH if done else None), token

    def _advance(self, piece: Slice, row: int) -> None:
        """Count a planned slice as done."""
        seq = piece.sequence
        seq.computed += piece.length
        if piece.samples:
            seq.promised += 1
            seq.promised_row = row
        if piece.samples and self.leaves(seq):
            self.running.remove(seq)
            self.leaving.append(seq)
            seq.state = State.LEAVING

    def _index(self, seq: Sequence) -> None:
        """Make the blocks that are full of landed, known tokens findable. Duplicates stay the sequence's own."""
        size = self.pool.block_size
        full = min(seq.landed, len(seq.tokens)) // size
        if full > seq.indexed:
            self.pool.insert(seq.tokens, seq.blocks, seq.request.salt, start=seq.indexed, stop=full)
            seq.indexed = full

    @property
    def _active(self) -> int:
        return len(self.running) + len(self.loading)

    def _admit(self, seq: Sequence, now: float) -> bool:
        """Start the first waiting sequence if all that it lacks fits, and one block more."""
        size, pool = self.pool.block_size, self.pool
        spare = 1 if self._active else 0
        needed = -(-seq.known // size) + spare
        if needed - pool.peek_media(seq.packed, seq.request.salt)[0] > pool.room():
            return False  # asked every step: do not count it as a look-up
        match = pool.match(seq.packed, seq.request.salt)
        if needed - sum(block.medium is Medium.HBM for block in match.addresses) > pool.room():
            match.release()
            return False
        self.waiting.popleft()
        blocks = match.take()
        first = next((place for place, block in enumerate(blocks) if block.medium is Medium.DRAM), None)
        if first is not None and not self.swap_costs.worth(
            sum(block.medium is Medium.DRAM for block in blocks), (len(blocks) - first) * size
        ):
            pool.free_mem(blocks[first:])
            del blocks[first:]
        seq.blocks = blocks
        seq.computed = seq.landed = len(blocks) * size
        seq.indexed = len(blocks)
        if seq.first_admission:
            seq.first_admission, seq.cached_tokens = False, min(seq.computed, len(seq.request.prompt))
        if not seq.stamps.planned:
            seq.stamps.planned = now
        self._start(seq)
        return True

    def _start(self, seq: Sequence) -> None:
        """A sequence with its first blocks runs, after those of them that lie in DRAM were swapped in."""
        in_dram = [place for place, block in enumerate(seq.blocks) if block.medium is Medium.DRAM]
        if len(in_dram) > self.pool.room():  # only for one that was adopted: compute again from the first of them
            self.pool.free_mem(seq.blocks[in_dram[0] :])
            del seq.blocks[in_dram[0] :]
            seq.computed = seq.landed = in_dram[0] * self.pool.block_size
            seq.indexed, in_dram = in_dram[0], []
        fresh = self.pool.swap_in([seq.blocks[place] for place in in_dram])
        for place, block in zip(in_dram, fresh, strict=True):
            seq.blocks[place] = block
        seq.table = [block.index for block in seq.blocks]
        if in_dram:
            seq.state = State.LOADING
            swap = self.pool.swaps.open_orders()[-1]
            self.loading[swap.number] = seq
            self.swaps_in.append(swap)
        else:
            seq.state = State.RUNNING
            bisect.insort(self.running, seq, key=_order)

    def _make_room(self, seq: Sequence, tokens: int, pieces: abc.Sequence[Slice], preempted: set[int] | None) -> bool:
        """Give ``seq`` blocks for its first ``tokens`` tokens, taking them from sequences behind it if need be.

        Those of ``pieces``, already in this plan, keep theirs. False when ``seq`` itself had to give up.
        """
        lacking = -(-tokens // self.pool.block_size) - len(seq.blocks)
        if lacking <= 0:
            return True
        while preempted is not None and self.pool.room() < lacking:
            planned = {id(piece.sequence) for piece in pieces}
            victims = [other for other in self.running if id(other) not in planned]
            victim = victims[-1]  # seq itself is among them
            preempted.add(id(victim))
            self._put_back(victim)
            self.preemptions += 1
            if victim is seq:
                return False
        try:
            blocks = self.pool.alloc_mem(lacking)
        except PoolFull:
            return False
        seq.blocks += blocks
        seq.table += [block.index for block in blocks]
        return True

    def _put_back(self, seq: Sequence) -> None:
        """A running sequence gives up its blocks and waits again, keeping its tokens."""
        self._index(seq)
        self.running.remove(seq)
        self._give_back(seq)
        seq.state = State.WAITING
        self._queue(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.pool.free_mem(seq.blocks)
        seq.blocks, seq.table, seq.turns = [], [], seq.turns + 1
        seq.computed = seq.landed = seq.indexed = 0

    def _queue(self, seq: Sequence) -> None:
        """Into the waiting line, to its place in the order."""
        bisect.insort(self.waiting, seq, key=_order)


def _order(seq: Sequence) -> tuple[float, float, int, str]:
    return order(seq.request)


def _slice(seq: Sequence, length: int) -> Slice:
    samples = seq.computed + length == seq.known
    row = seq.promised_row if seq.promised and samples else INVALID
    return Slice(seq, seq.computed, length, samples, row, seq.turns)
