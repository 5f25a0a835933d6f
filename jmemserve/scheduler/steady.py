"""Steady decoding: every sequence gains a token by every step, and a step differs from the one before by little.

    plan 7          rows a b c d: planned one by one, as always; ``Steady.of`` finds that they will go on like that
    plan 8, 9, ...  the same rows once more, so many tokens further: what changes is counted, not looked for

At a row's ``phase``, once per block, its next token begins a block. Whatever else happens (somebody comes, ends, gives
up its blocks, is asked to move) is seen by the running sequences being others, or told by ``reconsider``; then plans
are made one by one again. The outcome is the same to the last value. Pure.
"""

import dataclasses
from collections.abc import Sequence as Row

from jmemserve.scheduler.messages import Tokens
from jmemserve.scheduler.plan import Plan
from jmemserve.scheduler.sequence import Sequence, State


@dataclasses.dataclass(slots=True, eq=False)
class Steady:
    """What follows a plan of rows with one token each. Invariant: step n of it is planned after step n - 1."""

    plan: Plan  # the newest one
    sequences: list[Sequence]  # of its rows
    phases: list[list[tuple[int, Sequence]]]  # (row, sequence) that begin a block with step n, at n % block size
    last: int  # step with which the first of them has all its tokens
    stops: frozenset[int]  # tokens that end any of them
    context: int  # tokens that the first plan's rows look at, all together
    request_ids: tuple[str, ...]
    starts: tuple[int, ...]  # places in their outputs of the tokens that the first plan samples

    @staticmethod
    def of(plan: Plan, running: Row[Sequence], block_size: int) -> "Steady | None":
        """What follows ``plan``, if all that runs is in it with one token, and nobody leaves or ends by it."""
        if plan.shape.tokens > plan.shape.seqs or len(plan.planned) != len(running):
            return None
        phases: list[list[tuple[int, Sequence]]] = [[] for _ in range(block_size)]
        last, context, starts = None, 0, []
        for row, (piece, seq) in enumerate(zip(plan.planned, running, strict=True)):
            if piece.sequence is not seq or not piece.samples or seq.moving or seq.state is not State.RUNNING:
                return None
            limit = seq.request.params.max_tokens
            assert limit is not None, "max_tokens is resolved when a request is accepted"
            left = limit - seq.generated
            last = left if last is None else min(last, left)
            phases[-piece.start % block_size].append((row, seq))
            context += piece.start + 1
            starts.append(piece.start + 1 - len(seq.request.prompt))
        if not last:
            return None
        stops = frozenset[int]().union(*{seq.request.stop_ids for seq in running})
        ids = tuple([seq.request.id for seq in running])
        return Steady(plan, list(running), phases, last, stops, context, ids, tuple(starts))

    def beginning(self, step: int) -> list[tuple[int, Sequence]]:
        """(row, sequence) whose new token of this step is the first of a block."""
        return self.phases[step % len(self.phases)]

    def repeat(self, number: int, grown: tuple[tuple[int, int], ...]) -> Plan:
        """The next step; ``grown``: see ``Plan``."""
        plan, seqs = self.plan, self.sequences
        for seq in seqs:
            seq.computed += 1
            seq.promised += 1
        step = plan.repeats + 1
        self.plan = Plan(number, plan.shape, plan.planned, step, grown, self.context + step * len(seqs))
        return self.plan

    def tokens(self, plan: Plan, sampled: Row[int]) -> Tokens:
        """What is told of a repeated plan."""
        return Tokens(self.request_ids, self.starts, plan.repeats, tuple(sampled))

    def covers(self, plan: Plan, sampled: Row[int]) -> bool:
        """Did nothing but its tokens come of a repeated plan, after which others were planned?"""
        same = plan.repeats > 0 and plan.planned is self.plan.planned and plan.repeats < self.last
        return same and self.stops.isdisjoint(sampled)
