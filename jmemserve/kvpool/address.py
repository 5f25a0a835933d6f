"""The name of a block: where it lives, and which of its lives is meant."""

import enum
from typing import NamedTuple


class Medium(enum.IntEnum):
    """What kind of memory a block lies in."""

    HBM = 0  # memory of the device that computes
    DRAM = 1  # memory of its host
    MIXED = 2  # only as a wish: HBM as far as it goes, then DRAM


class BlockAddress(NamedTuple):
    """One block of one instance, during one use of it (paper section 4.1: every address encodes its instance).

    The generation rises whenever the block becomes free, and the epoch whenever the instance starts anew, so that an
    old address is told from a new one by comparison and never reads what somebody else wrote there since.
    """

    instance: str
    epoch: int
    medium: Medium
    index: int  # type: ignore[assignment]  # of the page or slot in the medium's arrays; number 0 is nobody's, so this is at least 1
    generation: int
