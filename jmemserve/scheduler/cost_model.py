"""What work costs on one instance, in seconds, predicted from its shape (paper section 5.3.2, operator level).

A step is three kinds of operators. Those bound by computing (matrix products) and the constant ones cost what the
step's compiled shape costs: with a short list of padded shapes, that table is the staircase of full and last waves
which the paper computes from thread blocks. Those bound by memory (attention) cost per pair of a new token with a token
of its context in packed steps, x^2 (1 - y^2) / 2 for a prompt of x tokens of which the share y is cached, and per token
of context that is read where a sequence has one new token. A kernel that works in tiles of so many queries and keys
looks at whole tiles of pairs. Pieces travel and swap at so much per call and per block. Tensor parallelism is in the
numbers: they are those of the whole instance.
"""

import bisect
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jmemserve.errors import ConfigError
from jmemserve.scheduler.plan import StepShape


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """The constants of one kind of instance: model, mesh and machine. Fitted, read from a file, or worked out."""

    steps: tuple[tuple[int, int, float], ...]  # (tokens, seqs, seconds with an empty context), in rising order
    pair_s: float = 0.0  # per (new token, token of its context), in packed steps
    context_s: float = 0.0  # per token of context, in steps of one token per sequence
    transfer_call_s: float = 0.0  # moving any blocks to another instance
    transfer_block_s: float = 0.0
    swap_call_s: float = 0.0  # bringing any blocks from host memory
    swap_block_s: float = 0.0
    about: str = ""  # of what, for people
    tile: int = 1  # queries and keys that attention looks at in one go, in packed steps
    padding_free: bool = False  # what only fills up a step's shape is not computed

    def check(self) -> None:
        """Raise ConfigError, naming the field, if a number cannot be a cost."""
        for name in _SECONDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} of a profile must be seconds, 0 or more, not {value!r}")
        for step in self.steps:
            if not (step[0] >= step[1] >= 1 and 0 < step[2] <= LONGEST_STEP_S):
                raise ConfigError(
                    f"a step of a profile is (tokens, at most as many sequences, seconds up to {LONGEST_STEP_S}), not "
                    f"{step}"
                )
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 1:
            raise ConfigError(f"tile of a profile must be 1 or more, not {self.tile!r}")
        if not isinstance(self.padding_free, bool):
            raise ConfigError(f"padding_free of a profile must be true or false, not {self.padding_free!r}")
        if not isinstance(self.about, str):
            raise ConfigError(f"about of a profile must be a text, not {self.about!r}")
        if not any(tokens > seqs for tokens, seqs, _ in self.steps):
            raise ConfigError(_UNPACKED)
        if len({(tokens, tokens > seqs) for tokens, seqs, _ in self.steps}) < len(self.steps):
            raise ConfigError("a profile has two steps for the same number of tokens")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Profile":
        """Raises ConfigError if the text is not what ``to_json`` writes."""
        try:
            values: dict[str, Any] = json.loads(text)
            steps = tuple((_whole(t), _whole(s), float(seconds)) for t, s, seconds in values.pop("steps"))
            profile = Profile(tuple(sorted(steps)), **values)
            profile.check()
            return profile
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"not a profile of an instance: {error!r}") from None


def _whole(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{number!r} is not a whole number")
    return number


LONGEST_STEP_S = 3600.0
_UNPACKED = "a profile needs a step of more tokens than sequences: prompts are computed in these"
_SECONDS = ("pair_s", "context_s", "transfer_call_s", "transfer_block_s", "swap_call_s", "swap_block_s")


class CostModel:
    """Predictions from a profile. Raises ConfigError if the profile has no step that could compute a prompt."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self._packed = sorted({tokens: s for tokens, seqs, s in profile.steps if tokens > seqs}.items())
        self._ones = sorted({tokens: s for tokens, seqs, s in profile.steps if tokens == seqs}.items())
        if not self._packed:
            raise ConfigError(_UNPACKED)
        self._sizes = [tokens for tokens, _ in self._packed]
        self._shapes = {StepShape(tokens, seqs): s for tokens, seqs, s in profile.steps}
        self._rows = [tokens for tokens, _ in self._ones]

    def step_s(self, shape: StepShape, new: int, pairs: float, context: int) -> float:
        """One step: new tokens, pairs of them with their contexts, and the context of rows with one new token."""
        packed = shape.tokens > shape.seqs
        if self.profile.padding_free:
            base = self._base(new) if packed else self.decode_step_s(new, 0)
        elif shape in self._shapes:
            base = self._shapes[shape]
        else:
            base = self._base(shape.tokens) if packed else self._decode_base(shape.tokens)
        return base + pairs * self.profile.pair_s + context * self.profile.context_s

    def rows_s(self, shape: StepShape, rows: Sequence[tuple[int, int]]) -> float:
        """One step of rows given as (first new token's place, new tokens)."""
        return self.step_s(shape, sum(new for _, new in rows), *work(shape, rows, self.profile.tile))

    def prefill_s(self, tokens: int, cached: int) -> float:
        """The paper's exec(x, y): a prompt of ``tokens`` with the first ``cached`` in place, on an idle instance."""
        new = tokens - cached
        if new <= 0:
            return 0.0
        largest, base = self._packed[-1]
        whole, rest = divmod(new, largest)
        seconds = whole * base
        pairs = visited(largest, cached, whole * largest, self.profile.tile)
        start = cached + whole * largest
        for shape, length in self._chunks(rest):
            seconds += self._base(length)
            pairs += visited(shape, start, length, self.profile.tile)
            start += length
        return seconds + pairs * self.profile.pair_s

    def _chunks(self, rest: int) -> list[tuple[int, int]]:
        """The last steps of a prompt, (shape, new tokens) each, cut as the scheduler of an instance cuts them."""
        chunks = []
        while rest:
            place = bisect.bisect_left(self._sizes, rest)
            shape, length = self._sizes[place], rest
            if place:
                below = self._sizes[place - 1]
                if below + self._sizes[bisect.bisect_left(self._sizes, rest - below)] < shape:
                    shape = length = below
            chunks.append((shape, length))
            rest -= length
        return chunks

    @property
    def longest_step_s(self) -> float:
        """The largest step that there is, without attention."""
        return self._packed[-1][1]

    def decode_step_s(self, running: int, context: int) -> float:
        """A step of ``running`` sequences with ``context`` tokens in all of them together.

        Between the compiled sizes in proportion: the batch will grow and shrink while a sequence is in it.
        """
        if running <= 0:
            return 0.0
        ones = self._ones or self._packed
        place = bisect.bisect_left(self._rows or self._sizes, running)
        if place == 0:
            base = ones[0][1]
        elif place == len(ones):
            base = ones[-1][1] * running / ones[-1][0]
        else:
            (low, low_s), (high, high_s) = ones[place - 1], ones[place]
            base = low_s + (high_s - low_s) * (running - low) / (high - low)
        return base + context * self.profile.context_s

    def transfer_s(self, blocks: int) -> float:
        """Moving so many blocks to another instance; none: nothing is moved."""
        return self.profile.transfer_call_s + blocks * self.profile.transfer_block_s if blocks else 0.0

    def swap_in_s(self, blocks: int) -> float:
        """Bringing so many blocks from host memory to the device."""
        return self.profile.swap_call_s + blocks * self.profile.swap_block_s if blocks else 0.0

    def _base(self, tokens: int) -> float:
        """The smallest packed step that holds so many tokens; beyond the largest, in proportion.

        Where padding is free, in proportion between the sizes, too; the least is a decode step of one row.
        """
        place = bisect.bisect_left(self._sizes, tokens)
        if place == len(self._packed):
            return self._packed[-1][1] * tokens / self._sizes[-1]
        size, seconds = self._packed[place]
        if not self.profile.padding_free or size == tokens:
            return seconds
        below, least = self._packed[place - 1] if place else (self._ones or self._packed)[0]
        return least + (seconds - least) * max(0, tokens - below) / max(1, size - below)

    def _decode_base(self, rows: int) -> float:
        if not self._ones:
            return self._base(rows)
        place = bisect.bisect_left(self._rows, rows)
        if place == len(self._ones):
            return self._ones[-1][1] * rows / self._rows[-1]
        return self._ones[place][1]


def visited(tokens: int, start: int, length: int, tile: int) -> float:
    """Pairs that attention looks at for ``length`` new tokens from place ``start``, in a step of ``tokens``.

    Each tile of queries looks at whole tiles of keys up to its last query. With tiles of one token that is
    ``x (x + 1) / 2`` of the whole less that of the cached part.
    """
    if not length:
        return 0.0
    rows = min(tile, tokens)
    tiles = -(-length // rows)
    full = tiles - 1  # those whose last query is not the row's
    below = full * (full + 1) / 2 * rows / tile + full * -(-start // tile)
    return (below + -(-(start + length) // tile)) * rows * tile


def work(shape: StepShape, rows: Iterable[tuple[int, int]], tile: int) -> tuple[float, int]:
    """(pairs, context) of a step's rows, given as (first new token's place, new tokens)."""
    pairs, context = 0.0, 0
    for start, length in rows:
        if length == 1:
            context += start + 1
        else:
            pairs += visited(shape.tokens, start, length, tile)
    return pairs, context
