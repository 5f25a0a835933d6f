"""From plans to orders: the host's numbers for a step, in few arrays.

    plan, planned one by one     every number is made from the sequences
    plan, repeated               the order before, copied; what counts up is counted up, and new blocks are put in

An order's arrays are never written to again: on CPU a compiled step may read them where they lie.
"""

import dataclasses

import jax
import numpy as np

from jmemserve.kernels import Ragged
from jmemserve.scheduler.plan import Plan, StepShape
from jmemserve.scheduler.sequence import Sequence
from jmemserve.types import INVALID, MAX_STOP_IDS


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """All that the host gives for one step. On a mesh of several processes each of them must give the same."""

    shape: StepShape
    ints: np.ndarray  # in the order of ``unpack``
    penalties: tuple[np.ndarray, ...] | None  # history, counts, banned, floats, from_last of ``sampling.penalize``
    draw: tuple[np.ndarray, ...] | None  # of ``sampling.draw``; None: every row is greedy and without penalties
    describe: bool  # somebody wants log probabilities


class Orders:
    """Of one runner. ``width``: blocks of the longest sequence."""

    def __init__(self, width: int, block_size: int, max_model_len: int):
        self._width, self._size, self._max_model_len = width, block_size, max_model_len
        self._last: tuple[Plan, Order] | None = None

    def make(self, plan: Plan) -> Order:
        """The order of a plan; quick if it repeats the plan of the last call."""
        order = None
        if plan.repeats and self._last is not None:
            before, last = self._last
            if before.planned is plan.planned and before.repeats == plan.repeats - 1 and last.penalties is None:
                order = self._again(plan, last)
        if order is None:
            order = self._anew(plan)
        self._last = plan, order
        return order

    def _anew(self, plan: Plan) -> Order:
        slices = plan.slices
        ints, from_last = _make_ints(plan, self._width, self._size)
        shaped = any(_shaped(piece.sequence) for piece in slices)
        params = [piece.sequence.request.params for piece in slices]
        return Order(
            plan.shape,
            ints,
            (*_make_penalties(plan, self._max_model_len), from_last) if shaped else None,
            _make_draw(plan) if shaped or any(p.temperature != 0 for p in params) else None,
            any(piece.samples and p.logprobs is not None for piece, p in zip(slices, params, strict=True)),
        )

    def _again(self, plan: Plan, last: Order) -> Order:
        """Each row is one token further, at the next slot, unless that begins a block."""
        rows, seqs = plan.num_rows, plan.shape.seqs
        ints = last.ints.copy()
        tables = 4 * seqs  # after tokens, positions, slots and context; see ``unpack``
        counted = ints[seqs:tables].reshape(3, seqs)[:, :rows]
        counted += 1
        if plan.repeats == 1:  # the plan before may have had tokens that the host knew
            ints[:rows] = 0
            ints[-seqs:][:rows] = np.arange(rows)
        for row, page in plan.grown:
            ints[tables + row * self._width + int(ints[seqs + row]) // self._size] = page
            ints[2 * seqs + row] = page * self._size
        draw = last.draw
        if draw is not None:
            further = draw[1].copy()
            further[3, :rows] += 1
            draw = draw[0], further
        return Order(plan.shape, ints, None, draw, last.describe)


def num_ints(shape: StepShape, width: int) -> int:
    """How many integers a step of this shape takes."""
    return 3 * shape.tokens + shape.seqs * (width + 3) + 1


def unpack(ints: jax.Array, shape: StepShape, width: int) -> tuple[jax.Array, Ragged, jax.Array]:
    """The one array that travels to the device per step -> (tokens, where they live, rows of the last output)."""
    t, b = shape.tokens, shape.seqs
    sizes = (t, t, t, b, b * width, b + 1, b)
    edges = np.cumsum((0, *sizes))
    assert edges[-1] == num_ints(shape, width), (edges[-1], shape, width)
    tokens, positions, slots, context, tables, starts, from_last = (
        ints[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True)
    )
    return tokens, Ragged(positions, slots, tables.reshape(b, width), context, starts), from_last


def _make_ints(plan: Plan, width: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The step's integers, in the order of ``unpack``; padding writes to page 0."""
    t, b = plan.shape.tokens, plan.shape.seqs
    tokens, positions, slots = np.zeros((3, t), np.int32)
    tables = np.zeros((b, width), np.int32)
    context, from_last = np.zeros(b, np.int32), np.full(b, INVALID, np.int32)
    starts = np.zeros(b + 1, np.int32)
    at = 0
    for row, piece in enumerate(plan.slices):
        seq, stop = piece.sequence, piece.start + piece.length
        end = at + piece.length
        host = seq.tokens[piece.start : stop]
        assert len(host) == piece.length - (piece.promised_row != INVALID), (len(host), piece)
        tokens[at : at + len(host)] = host
        table = np.array(seq.table[: -(-stop // block_size)], np.int32)
        tables[row, : len(table)] = table
        place = np.arange(piece.start, stop, dtype=np.int32)
        positions[at:end] = place
        slots[at:end] = table[place // block_size] * block_size + place % block_size
        context[row], from_last[row] = stop, piece.promised_row
        starts[row + 1] = at = end
    starts[len(plan.slices) + 1 :] = at
    return np.concatenate((tokens, positions, slots, context, tables.ravel(), starts, from_last)), from_last


def _make_draw(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of ``sampling.draw``."""
    floats = np.zeros((3, plan.shape.seqs), np.float32)
    floats[1] = 1
    ints = np.zeros((4, plan.shape.seqs), np.uint32)
    for row, piece in enumerate(plan.slices):
        request = piece.sequence.request
        params = request.params
        floats[:, row] = params.temperature, max(params.top_p, 1e-30), params.min_p  # no top_p is 0 in float32
        position = piece.start + piece.length
        ints[:, row] = max(0, params.top_k), request.seed >> 32, request.seed & 0xFFFFFFFF, position
    return floats, ints.view(np.int32)


def _shaped(seq: Sequence) -> bool:
    """Do penalties or banned tokens change this sequence's logits?"""
    params = seq.request.params
    return params.has_penalties or seq.generated <= params.min_tokens and params.min_tokens > 0


def _make_penalties(plan: Plan, max_model_len: int) -> tuple[np.ndarray, ...]:
    """The first arrays of ``sampling.penalize``; rows without penalties get ones that change nothing."""
    rows = plan.shape.seqs
    history = np.zeros((rows, max_model_len), np.int32)
    counts = np.zeros((2, rows), np.int32)
    banned = np.full((rows, MAX_STOP_IDS), INVALID, np.int32)
    floats = np.zeros((3, rows), np.float32)
    floats[0] = 1
    for row, piece in enumerate(plan.slices):
        seq = piece.sequence
        params = seq.request.params
        history[row, : len(seq.tokens)] = seq.tokens
        counts[:, row] = len(seq.request.prompt), len(seq.tokens)
        floats[:, row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        drawn_before = piece.start + piece.length - len(seq.request.prompt)
        if drawn_before < params.min_tokens:
            ids = sorted(seq.request.stop_ids)
            banned[row, : len(ids)] = ids
    return history, counts, banned, floats
