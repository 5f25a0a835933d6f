"""Numbers about a pool, for load reports, metrics and people."""

import dataclasses
from collections.abc import Sequence

from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.ledger import Ledger
from jmemserve.kvpool.swaps import Swaps


@dataclasses.dataclass(frozen=True, slots=True)
class MediumStats:
    """A momentary view of one medium, in blocks."""

    free: int
    held: int
    cached: int
    capacity: int


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStats:
    """A momentary view of a pool; tokens, evictions and swaps count since its start."""

    hbm: MediumStats
    dram: MediumStats
    hit_tokens: int  # found by ``match``
    dram_hit_tokens: int  # of these, found in DRAM
    query_tokens: int  # asked of ``match``
    evictions: int  # cached copies dropped to make room
    swapped_out: int  # blocks whose bytes came to DRAM
    swapped_in: int  # blocks whose bytes came back to HBM
    prefix_blocks: int  # blocks of tokens in the index, wherever their copies are
    runs: int  # nodes of the index

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for name, medium in (("HBM", self.hbm), ("DRAM", self.dram)):
            if medium.capacity:
                used = 100 * (medium.capacity - medium.free) / medium.capacity
                counts = f"{medium.held} held, {medium.cached} cached, {medium.free} free"
                parts.append(f"{name} {used:.0f}% of {medium.capacity} ({counts})")
        hits = f"{100 * self.hit_tokens / self.query_tokens:.0f}% hits" if self.query_tokens else "no look-ups yet"
        return f"{', '.join(parts)}; {hits}"


@dataclasses.dataclass(slots=True)
class Lookups:
    """What ``match`` was asked and what it found, in tokens."""

    query_tokens: int = 0
    hit_tokens: int = 0
    dram_hit_tokens: int = 0

    def count(self, asked: int, found: int, in_dram: int) -> None:
        """One look-up."""
        self.query_tokens += asked
        self.hit_tokens += found
        self.dram_hit_tokens += in_dram

    def stats(self, ledgers: Sequence[Ledger], index: TokenIndex, swaps: Swaps, evictions: int) -> PoolStats:
        """All counts of a pool."""
        hbm, dram = (MediumStats(x.num_free, x.num_held, x.num_cached, x.capacity) for x in ledgers)
        return PoolStats(
            hbm,
            dram,
            **dataclasses.asdict(self),
            evictions=evictions,
            swapped_out=swaps.swapped_out,
            swapped_in=swaps.swapped_in,
            prefix_blocks=index.num_blocks,
            runs=index.num_nodes,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStats:
    """What a node has moved; all but the first two and the last two count since its start."""

    transfers_out: int
    transfers_in: int
    transfer_calls: int  # transfers times parts (paper section 4)
    network_calls: int  # contiguous runs of bytes handed to a transport
    bytes_out: int
    bytes_in: int
    dropped: int  # messages that were late, doubled, unknown or wrong
    corrupt: int  # pieces whose checksums differed
    expired_leases: int  # blocks freed because nobody renewed their lease
    failed: int  # transfers from here that ended without success
    staged_bytes: int  # published and not yet landed
    swaps: int  # orders under way
