"""What it costs to have keys and values in place: computing them, or bringing them back from host memory."""

import dataclasses

SMOOTHING = 0.1  # weight of the newest measurement
ENOUGH = 8  # measurements before a mean is believed


@dataclasses.dataclass(frozen=True, slots=True)
class SwapCosts:
    """Seconds. Zeros: not known, so whatever is in DRAM is swapped in."""

    prefill_s_per_token: float = 0.0
    swap_s_per_block: float = 0.0

    def worth(self, blocks: int, tokens: int) -> bool:
        """Is swapping so many blocks in no dearer than computing so many tokens again?"""
        return not self.prefill_s_per_token or blocks * self.swap_s_per_block <= tokens * self.prefill_s_per_token


class CostMeter:
    """Running means of what steps and swaps took on this instance."""

    def __init__(self) -> None:
        self._prefill, self._swap = _Mean(), _Mean()

    def step(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens, most of them of prompts."""
        self._prefill.add(seconds / tokens)

    def swap(self, blocks: int, seconds: float) -> None:
        """A worker brought so many blocks from host memory to the device."""
        self._swap.add(seconds / blocks)

    def costs(self) -> SwapCosts:
        """What is known so far."""
        if self._prefill.count < ENOUGH or self._swap.count < ENOUGH:
            return SwapCosts()
        return SwapCosts(self._prefill.value, self._swap.value)


@dataclasses.dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: int = 0

    def add(self, new: float) -> None:
        self.count += 1
        self.value += max(SMOOTHING, 1 / self.count) * (new - self.value)
