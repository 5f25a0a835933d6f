"""What one step does, as plain values: it can be logged, replayed, or sent to another host."""

import dataclasses

from jmemserve.scheduler.sequence import Sequence
from jmemserve.types import INVALID


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """The static key of the compiled step. tokens == seqs: every row has exactly one new token."""

    tokens: int
    seqs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """New tokens ``start : start + length`` of one sequence. ``samples`` iff they reach its last known token."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    promised_row: int  # row of the flight in the air that holds the last token, or INVALID when the host knows it
    turn: int  # the sequence's turn when this was planned


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One step of one instance; row b of the step is ``slices[b]``.

    With ``repeats`` it is a plan of one token per row once more: each row is so many tokens further than ``planned``
    says, and takes its token from the same row of the flight before, which had one repeat less.
    """

    number: int
    shape: StepShape
    planned: tuple[Slice, ...]
    repeats: int = 0
    grown: tuple[tuple[int, int], ...] = ()  # (row, page) of rows whose token begins a block; of a repeated plan
    context: int = 0  # tokens that all rows look at together; of a repeated plan

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The rows. Of a repeated plan they are made when somebody asks."""
        if not self.repeats:
            return self.planned
        return tuple(
            Slice(piece.sequence, piece.start + self.repeats, 1, True, row, piece.turn)
            for row, piece in enumerate(self.planned)
        )

    @property
    def num_rows(self) -> int:
        return len(self.planned)

    @property
    def num_tokens(self) -> int:
        return sum(piece.length for piece in self.planned)


def step_shapes(
    decodes: bool, prefills: bool, max_seqs: int, max_tokens: int, fewest_rows: int = 1
) -> tuple[StepShape, ...]:
    """The short list of shapes that an instance compiles, smallest first.

    One-token rows in powers of two from ``fewest_rows`` up to ``max_seqs``; packed steps in few sizes up to
    ``max_tokens``. An instance that only decodes keeps one small packed shape to catch up with, one that only prefills
    decodes (when nobody takes a sequence) in its smallest packed shape: any instance can catch up any sequence.
    """
    packed = {max_tokens}
    size = 16
    while size < max_tokens:
        packed.add(size)
        size *= 2 if size >= 256 else 4
    packed = {size for size in packed if size > max_seqs}
    assert packed, f"{max_tokens=} leave prompts no room beside {max_seqs=}"
    shapes = set()
    if decodes:
        rows = fewest_rows
        while rows < max_seqs:
            shapes.add(StepShape(rows, rows))
            rows *= 2
        shapes.add(StepShape(max_seqs, max_seqs))
    if not prefills:
        packed = {min((size for size in packed if size >= 64), default=max(packed))}
    shapes |= {StepShape(size, max_seqs) for size in packed}
    return tuple(sorted(shapes))


def smallest(shapes: tuple[StepShape, ...], lengths: list[int]) -> StepShape | None:
    """The first shape that can hold rows of these lengths, or None. A one-token shape holds nothing else."""
    tokens, ones = sum(lengths), all(length == 1 for length in lengths)
    for shape in shapes:
        if shape.tokens >= tokens and shape.seqs >= len(lengths) and (ones or shape.tokens > shape.seqs):
            return shape
    return None


def trim(shapes: tuple[StepShape, ...], pieces: list[Slice]) -> None:
    """Shorten the last long slice where that saves padding: 520 tokens cost less as 512 and 8 than as 1,024."""
    if pieces[-1].length == 1:
        return
    lengths = [piece.length for piece in pieces]
    shape, total = smallest(shapes, lengths), sum(lengths)
    packed = sorted({shape.tokens for shape in shapes if shape.tokens > shape.seqs})
    last = pieces[-1]
    fitting = [size for size in packed if total - last.length < size < total]
    if shape is None or shape.tokens not in packed or not fitting:
        return
    rest = next(size for size in packed if size >= total - fitting[-1])
    if fitting[-1] + rest < shape.tokens:
        length = last.length - (total - fitting[-1])
        pieces[-1] = dataclasses.replace(last, length=length, samples=False, promised_row=INVALID)
