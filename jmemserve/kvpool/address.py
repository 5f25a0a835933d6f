"""The name of a block: where it lives, and which of its lives is meant."""

import dataclasses
import enum


class Medium(enum.Enum):
    """What kind of memory a block lies in."""

    HBM = "hbm"  # memory of the device that computes
    DRAM = "dram"  # memory of its host


@dataclasses.dataclass(frozen=True, slots=True)
class BlockAddress:
    """One block of one instance, during one use of it.

    The generation rises whenever the block becomes free, and the epoch whenever the instance starts anew, so that an
    old address is told from a new one by comparison and never reads what somebody else wrote there since.
    """

    instance: str
    epoch: int
    medium: Medium
    index: int  # of the page in the instance's arrays; page 0 is nobody's, so this is at least 1
    generation: int
