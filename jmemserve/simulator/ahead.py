"""Many steps at once: while an instance does nothing but decode, what its next steps do needs no loop.

A stretch is a run of like steps, each with one new token of the same sequences, in which no sequence ends, needs a
block or fills one. All that they change can be said at their end; until then only the times at which they end are
known. What comes to pass meanwhile cuts the stretch at the end of the step in the air, as the loop would notice it
then. The outcome is the loop's to the last bit: the same sums in the same order.
"""

import bisect
import dataclasses

from jmemserve.scheduler.cost_model import CostModel
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.scheduler.plan import Plan
from jmemserve.scheduler.sequence import Sequence, State
from jmemserve.simulator.load import made_up

FEWEST = 3  # steps that are worth it
MOST = 64  # a stretch that is cut is begun anew


@dataclasses.dataclass(slots=True, eq=False)
class Stretch:
    """``plan`` is in the air when it begins; step n ends at ``ends[n]`` and the one after that is launched then."""

    plan: Plan
    ends: list[float]
    number: int = 0  # raised by every cut

    def cut(self, now: float) -> bool:
        """Something has come: the step in the air is the last. False if it is already."""
        count = bisect.bisect_right(self.ends, now) + 1
        if count >= len(self.ends):
            return False
        del self.ends[count:]
        self.number += 1
        return True

    def apply(self, scheduler: LocalScheduler) -> Plan:
        """Let all steps but the last have been planned and committed; returns the one that is in the air then."""
        count, end = len(self.ends), self.ends[-1]
        following = []
        for row, piece in enumerate(self.plan.slices):
            seq, start = piece.sequence, piece.start
            seed = seq.request.seed
            seq.tokens += [made_up(seed, place) for place in range(start + 1, start + 1 + count)]
            seq.computed += count
            seq.landed = start + count
            seq.promised_row = row
            seq.stamps.last_token = end
            following.append(dataclasses.replace(piece, start=start + count, promised_row=row))
        scheduler.plans += count
        scheduler.reconsider()
        return Plan(scheduler.plans, self.plan.shape, tuple(following))


def find(scheduler: LocalScheduler, plan: Plan, costs: CostModel, end: float) -> Stretch | None:
    """The stretch that begins with ``plan`` in the air, which ends at ``end``. None: the loop has something to do."""
    shape, running = plan.shape, scheduler.running
    if scheduler.waiting or scheduler.loading or shape.tokens > shape.seqs or len(plan.slices) != len(running):
        return None
    count, size = MOST, scheduler.pool.block_size
    for piece, seq in zip(plan.slices, running, strict=True):
        if piece.sequence is not seq or not _decodes(seq) or piece.turn != seq.turns or scheduler.leaves(seq):
            return None
        limit = seq.request.params.max_tokens
        assert limit is not None, "max_tokens is resolved when a request is accepted"
        room = min(seq.indexed + 1, len(seq.blocks)) * size - seq.computed
        count = min(count, room, limit - seq.generated)
    if count < FEWEST:
        return None
    ends, rows = [end], len(running)
    context = sum(seq.computed for seq in running)
    for _ in range(count - 1):
        context += rows
        end += costs.step_s(shape, rows, 0, context)
        ends.append(end)
    return Stretch(plan, ends)


def _decodes(seq: Sequence) -> bool:
    """Does it gain a token by each step, one of which is in the air, and has somebody heard of its first one?"""
    steady = seq.state is State.RUNNING and seq.gap == 1 == seq.promised
    return steady and seq.stamps.first_token > 0.0 and not seq.request.stop_ids
