"""One instance's memory: blocks by address, references, the index of cached prefixes, and the transfer protocol."""

from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.index import block_keys
from jmemserve.kvpool.pool import Match, MemPool, PoolStats

__all__ = ["BlockAddress", "Match", "MemPool", "Medium", "PoolStats", "block_keys"]
