"""MemPool: who holds which block of an instance, and which prefixes are cached. It decides; it moves no bytes.

    alloc_mem ──▶ held ──insert──▶ held and in the index ──free_mem──▶ cached ──match──▶ held ...
                   └──────free_mem──▶ free ◀──────evicted by alloc_mem────┘

A block can be found by ``match`` only after ``insert``, and its holder calls that when the bytes are in place: the
index entry is the commit record. All of a pool's calls come from one thread; none of them waits.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from jmemserve.errors import ForeignAddress, PoolFull, StaleAddress
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.ledger import Ledger

Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStats:
    """A momentary view of a pool, in blocks; tokens and evictions count since its start."""

    free: int
    held: int
    cached: int
    capacity: int
    hit_tokens: int  # found by ``match``
    query_tokens: int  # asked of ``match``
    evictions: int  # cached blocks dropped to make room


class Match:
    """A lease on the cached blocks of a prefix: one reference on each, until ``release`` or ``take``.

    As a context manager it releases at the end of the block what was not taken.
    """

    __slots__ = ("_addresses", "_pool", "num_tokens")

    def __init__(self, pool: "MemPool", addresses: list[BlockAddress], num_tokens: int):
        self._pool: MemPool | None = pool
        self._addresses = addresses
        self.num_tokens = num_tokens  # covered by the addresses: whole blocks

    @property
    def addresses(self) -> tuple[BlockAddress, ...]:
        """The blocks in token order; empty once released or taken."""
        return tuple(self._addresses)

    def release(self) -> None:
        """Give the references back. Further calls do nothing."""
        pool, self._pool = self._pool, None
        addresses, self._addresses = self._addresses, []
        if pool is not None:
            pool.free_mem(addresses)

    def take(self) -> list[BlockAddress]:
        """End the lease and return the addresses; the caller owns the references and frees them."""
        self._pool = None
        addresses, self._addresses = self._addresses, []
        return addresses

    def __enter__(self) -> "Match":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class MemPool:
    """The blocks 1 .. num_blocks of one instance, ``block_size`` tokens each. Its arrays have num_blocks + 1 pages."""

    # Invariant: free + held + cached == capacity, and a cached block is in the index exactly once.

    def __init__(self, instance: str, epoch: int, num_blocks: int, block_size: int):
        assert block_size >= 1, f"{block_size=}"
        self.instance = instance
        self.epoch = epoch
        self.block_size = block_size
        self.capacity = num_blocks
        self._ledger = Ledger(num_blocks)
        self._index = TokenIndex(block_size, num_blocks, lambda block: self._ledger.refs[block] > 0)
        self._addresses: list[BlockAddress | None] = [None] * (num_blocks + 1)  # of the current generation
        self._owner: dict[int, str] = {}  # block -> whose the reference of its allocation is, if anybody's by name
        self._owned: dict[str, set[int]] = {}  # the same by owner
        self._hit_tokens = 0
        self._query_tokens = 0
        self._evictions = 0

    # -- asking ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self._ledger.num_free

    @property
    def held(self) -> int:
        return self._ledger.num_held

    @property
    def cached(self) -> int:
        return self._ledger.num_cached

    def room(self, medium: Medium = Medium.HBM) -> int:
        """How many blocks ``alloc_mem`` can give now: free and cached. This pool has blocks in HBM only."""
        return self._ledger.num_free + self._ledger.num_cached if medium is Medium.HBM else 0

    def address(self, index: int) -> BlockAddress:
        """The address of a block in its current generation."""
        assert 0 < index <= self.capacity, f"block {index} is not in 1..{self.capacity}"
        address = self._addresses[index]
        if address is None:
            generation = self._ledger.generations[index]
            address = BlockAddress(self.instance, self.epoch, Medium.HBM, index, generation)
            self._addresses[index] = address
        return address

    def stats(self) -> PoolStats:
        """Counts for load reports and metrics."""
        return PoolStats(
            free=self.free,
            held=self.held,
            cached=self.cached,
            capacity=self.capacity,
            hit_tokens=self._hit_tokens,
            query_tokens=self._query_tokens,
            evictions=self._evictions,
        )

    def __repr__(self) -> str:
        return (
            f"<MemPool {self.instance} hbm {self.held} held {self.cached} cached {self.free} free of {self.capacity}>"
        )

    # -- references --------------------------------------------------------------------------------------------------

    def alloc_mem(self, n: int, medium: Medium = Medium.HBM, owner: str | None = None) -> list[BlockAddress]:
        """Allocate n blocks with one reference each, dropping cached ones (oldest leaf first) if it must.

        All or nothing: raises PoolFull, changing nothing, if free and cached together are too few. With an owner, the
        references are that owner's: ``free_mem`` and ``disown`` name it, ``free_owned_by`` gives all of them back.
        """
        assert n >= 0, f"{n=}"
        if n > self.room(medium):
            raise PoolFull(n, *((self.free, self.cached) if medium is Medium.HBM else (0, 0)))
        if n == 0:
            return []
        if n > self._ledger.num_free:
            self._make_room(n)
        blocks = self._ledger.take(n)
        if owner is not None:
            self._owner.update(dict.fromkeys(blocks, owner))
            self._owned.setdefault(owner, set()).update(blocks)
        return [self.address(block) for block in blocks]

    def free_mem(self, addresses: Sequence[BlockAddress], owner: str | None = None) -> None:
        """Give back one reference on each address; blocks in the index become cached, others free.

        ``addresses`` are in token order, so that the end of a prefix is evicted before its start. With an owner, the
        references are those allocated with it. All or nothing: raises StaleAddress (also for a double free) or
        ForeignAddress, changing nothing.
        """
        blocks = self._held_blocks(addresses, owner)
        if owner is not None:
            self._forget_owner(blocks, owner)
        for block in reversed(blocks):
            self._drop(block)

    def disown(self, addresses: Sequence[BlockAddress], owner: str) -> None:
        """Turn references allocated with this owner into the caller's own. Raises like ``free_mem``."""
        self._forget_owner(self._held_blocks(addresses, owner), owner)

    def free_owned_by(self, owner: str) -> int:
        """Give back every reference allocated with this owner (a dead peer, say) and return how many there were."""
        blocks = sorted(self._owned.get(owner, ()))
        self._forget_owner(blocks, owner)
        for block in blocks:
            self._drop(block)
        return len(blocks)

    # -- the index ---------------------------------------------------------------------------------------------------

    def insert(self, tokens: Tokens, addresses: Sequence[BlockAddress], salt: str = "") -> list[BlockAddress]:
        """Make the whole blocks of ``tokens`` findable: the caller holds the addresses and their bytes are in place.

        Addresses beyond the whole blocks are ignored. Returns the duplicates, addresses whose place is taken by
        another block already; like all others they stay the caller's. The caller's references are not touched, and
        inserting the same again changes nothing. Raises StaleAddress or ForeignAddress, changing nothing.
        """
        count = len(tokens) // self.block_size
        assert len(addresses) >= count, f"{len(tokens)=} make {count} whole blocks, but {len(addresses)=}"
        blocks = [self._live_block(address) for address in addresses[:count]]
        duplicates = self._index.insert(tokens, salt, blocks)
        return [addresses[position] for position in duplicates]

    def match(self, tokens: Tokens, salt: str = "") -> Match:
        """Find the longest cached prefix in whole blocks, hold it, and return the lease; the caller ends it.

        It never covers the last token, whose logits somebody is about to need.
        """
        found = self.hold(tokens, salt, (len(tokens) - 1) // self.block_size)
        self._query_tokens += len(tokens)
        self._hit_tokens += found.num_tokens
        return found

    def hold(self, tokens: Tokens, salt: str, limit: int) -> Match:
        """Hold the longest cached prefix of at most ``limit`` whole blocks, the last token's too; the caller ends it.

        This is for keys and values that travel; it does not count as a hit or a query.
        """
        blocks = self._index.find(tokens, salt, limit)
        self._ledger.hold(blocks)
        return Match(self, list(map(self.address, blocks)), len(blocks) * self.block_size)

    def peek(self, tokens: Tokens, salt: str = "") -> int:
        """How many tokens ``match`` would find. Holds nothing and changes nothing, not even the order of eviction."""
        return len(self._index.find(tokens, salt, (len(tokens) - 1) // self.block_size)) * self.block_size

    def delete(self, tokens: Tokens, salt: str = "") -> int:
        """Forget the prefix made of the whole blocks of ``tokens`` and all that continues it; return how many blocks.

        Nothing happens if the index does not know all of that prefix. Held blocks survive until they are freed.
        """
        return self._forget(self._index.remove(tokens, salt))

    def clear(self) -> int:
        """Forget every prefix and return how many blocks the index had. Held blocks survive until they are freed."""
        return self._forget(self._index.remove_all())

    def check(self) -> None:
        """Recompute all that is stored twice and assert that it agrees. Slow: for tests and idle moments."""
        self._ledger.check(self._index.check())
        for block, address in enumerate(self._addresses):
            if address is not None:
                generation = self._ledger.generations[block]
                expected = BlockAddress(self.instance, self.epoch, Medium.HBM, block, generation)
                assert address == expected, f"{address} != {expected}"
        owned = {block: owner for owner, blocks in self._owned.items() for block in blocks}
        assert owned == self._owner, f"{owned=} != {self._owner=}"
        assert all(self._owned.values()), f"an owner of nothing is kept: {self._owned}"
        assert all(self._ledger.refs[block] > 0 for block in owned), f"an owned block is not held: {owned}"

    # -- parts -------------------------------------------------------------------------------------------------------

    def _live_block(self, address: BlockAddress) -> int:
        """The index of an address whose block is held by somebody."""
        index = address.index
        if address.instance != self.instance or address.medium is not Medium.HBM or not 0 < index <= self.capacity:
            raise ForeignAddress(f"{address} is not of {self!r}")
        if address is not self._addresses[index] and address != self.address(index):
            raise StaleAddress(f"{address} was freed; the block is in generation {self.address(index)} now")
        if self._ledger.refs[index] == 0:
            raise StaleAddress(f"{address} was freed: nobody holds it")
        return index

    def _held_blocks(self, addresses: Sequence[BlockAddress], owner: str | None) -> list[int]:
        """The indices of addresses on each of which the caller can have a reference to give back."""
        blocks = [self._live_block(address) for address in addresses]
        if owner is not None:
            counts = Counter(blocks)
            for block, count in counts.items():
                if self._owner.get(block) != owner or count > 1:
                    raise StaleAddress(f"{self.address(block)} is not held by {owner!r} {count} times")
        elif self._owner or len(set(blocks)) < len(blocks):
            for block, count in Counter(blocks).items():
                anonymous = self._ledger.refs[block] - (block in self._owner)
                if count > anonymous:
                    raise StaleAddress(f"{self.address(block)} is freed {count} times but held {anonymous} times")
        return blocks

    def _forget_owner(self, blocks: Sequence[int], owner: str) -> None:
        if not blocks:
            return
        owned = self._owned[owner]
        for block in blocks:
            del self._owner[block]
            owned.remove(block)
        if not owned:
            del self._owned[owner]

    def _drop(self, block: int) -> None:
        if self._ledger.drop(block):
            return
        if block in self._index:
            self._ledger.keep(block)
            self._index.unheld(block)
        else:
            self._addresses[block] = None
            self._ledger.free(block)

    def _evict(self, block: int) -> None:
        self._addresses[block] = None
        self._ledger.evict(block)

    def _make_room(self, n: int) -> None:
        """Drop cached blocks until n are free. There must be enough of them."""
        while self._ledger.num_free < n:
            block = self._index.pop_oldest_leaf()
            if block is None:
                break
            self._evict(block)
            self._evictions += 1
        if self._ledger.num_free < n:  # the rest lies above held blocks, which leave the index with it
            for blocks in self._index.pop_oldest_subtrees():
                before = self._ledger.num_cached
                self._forget(blocks)
                self._evictions += before - self._ledger.num_cached
                if self._ledger.num_free >= n:
                    break
        assert self._ledger.num_free >= n, f"{self._ledger.num_free=} < {n=} with {self._ledger.num_cached=}"

    def _forget(self, blocks: Sequence[int]) -> int:
        """These blocks left the index: those that nobody holds become free."""
        refs = self._ledger.refs
        for block in blocks:
            if refs[block] == 0:
                self._evict(block)
        return len(blocks)
