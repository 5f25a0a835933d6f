"""One instance's memory: blocks by address, references, the index of cached prefixes, and their transfer."""

from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.blocks import BlockPool
from jmemserve.kvpool.lease import Match
from jmemserve.kvpool.runs import block_keys
from jmemserve.kvpool.stats import MediumStats, NodeStats, PoolStats
from jmemserve.kvpool.swaps import Swap
from jmemserve.kvpool.transfer.messages import Flags, Granularity

__all__ = [
    "BlockAddress",
    "BlockPool",
    "Flags",
    "Granularity",
    "Match",
    "MediumStats",
    "Medium",
    "NodeStats",
    "PoolStats",
    "Swap",
    "block_keys",
]
