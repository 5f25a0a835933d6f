"""What it costs to have keys and values in place: computing them, or bringing them back from host memory."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class SwapCosts:
    """Seconds, as measured at start-up. Zeros: swapping is free, so whatever is in DRAM is swapped in."""

    prefill_s_per_token: float = 0.0
    swap_s_per_block: float = 0.0

    def worth(self, blocks: int, tokens: int) -> bool:
        """Is swapping so many blocks in cheaper than computing so many tokens again?"""
        return blocks * self.swap_s_per_block <= tokens * self.prefill_s_per_token or not self.prefill_s_per_token
