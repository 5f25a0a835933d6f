"""BlockPool: who holds which block of an instance, and which prefixes are cached where. It decides; it moves no bytes.

    alloc_mem ──▶ held ──insert──▶ held and in the index ──free_mem──▶ cached ──match──▶ held ...
                   └──────free_mem──▶ free ◀──────evicted by alloc_mem────┘

A block can be found by ``match`` only after ``insert``, and its holder calls that when the bytes are in place: the
index entry is the commit record. Copies between HBM and DRAM are *orders* (``swaps``): whoever owns the arrays takes
them before any other device work of his and says when the bytes have arrived. All of a pool's calls come from one
thread; none of them waits.
"""

from collections.abc import Sequence

import numpy as np

from jmemserve.errors import InvalidAddresses, PoolFull, Unavailable
from jmemserve.kvpool import audit, reclaim
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.events import EventLog, Snapshot
from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.lease import Match
from jmemserve.kvpool.ledger import Ledger
from jmemserve.kvpool.references import References
from jmemserve.kvpool.runs import DRAM, HBM, pack
from jmemserve.kvpool.stats import Lookups, PoolStats
from jmemserve.kvpool.swaps import Swaps

Tokens = Sequence[int] | np.ndarray
Addresses = Sequence[BlockAddress]


class BlockPool:
    """The blocks of one instance, ``block_size`` tokens each: 1 .. num_blocks in HBM, 1 .. dram_blocks in DRAM.

    ``model`` is the identity of what the keys and values were made by; ``quota`` bounds the cached blocks of each
    cache salt per medium; a ``log`` gets an event for every copy that the index gains or loses.
    """

    # Invariant, per medium: free + held + cached == capacity, and a cached block is in the index exactly once.

    def __init__(
        self,
        instance: str,
        epoch: int,
        num_blocks: int,
        block_size: int,
        dram_blocks: int = 0,
        model: str = "",
        quota: tuple[int | None, int | None] | None = None,
        log: EventLog | None = None,
    ):
        assert block_size >= 1, f"{block_size=}"
        self.instance, self.epoch, self.block_size, self.model = instance, epoch, block_size, model
        self.caching = True  # off: ``insert`` keeps nothing and nothing is found
        self.log = log
        self._ledgers = (Ledger(instance, epoch, HBM, num_blocks), Ledger(instance, epoch, DRAM, dram_blocks))
        refs_hbm, refs_dram = self._ledgers[HBM].refs, self._ledgers[DRAM].refs
        self._index = TokenIndex(
            block_size,
            (num_blocks, dram_blocks),
            lambda location: (refs_hbm[location] if location > 0 else refs_dram[-location]) > 0,
            log,
            quota,
        )
        self._refs = References(self._ledgers, self._index)
        self._owners = self._refs.owners
        self.swaps = Swaps(self._ledgers, self._index, self._refs)
        self._lookups, self._evictions = Lookups(), 0
        self.forgotten_subtrees = 0  # prefixes lost with all that continued them, since that was held

    # -- asking ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self._ledgers[HBM].num_free

    @property
    def held(self) -> int:
        return self._ledgers[HBM].num_held

    @property
    def cached(self) -> int:
        return self._ledgers[HBM].num_cached

    @property
    def capacity(self) -> int:
        return self._ledgers[HBM].capacity

    def room(self, medium: Medium = HBM) -> int:
        """How many blocks ``alloc_mem`` can give now: free and cached."""
        if medium is Medium.MIXED:
            return self._ledgers[HBM].room + self._ledgers[DRAM].room
        return self._ledgers[medium].room

    def address(self, index: int, medium: Medium = HBM) -> BlockAddress:
        """The address of a block in its current generation."""
        assert 0 < index <= self._ledgers[medium].capacity, f"{index=} is not in 1..{self._ledgers[medium].capacity}"
        return self._ledgers[medium].address(index)

    def stats(self) -> PoolStats:
        """Counts for load reports and metrics."""
        return self._lookups.stats(self._ledgers, self._index, self.swaps, self._evictions)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.instance}: {self.stats().describe()}>"

    # -- references --------------------------------------------------------------------------------------------------

    def alloc_mem(self, n: int, medium: Medium = HBM, owner: str | None = None) -> list[BlockAddress]:
        """Allocate n blocks with one reference each, dropping or swapping out cached ones if it must (paper 4.1).

        All or nothing: raises PoolFull, changing nothing, if free and cached together are too few. MIXED takes HBM
        first, then DRAM. With an owner, the references are that owner's: ``free_mem`` names it, ``free_owned_by``
        gives all of them back. The caller frees what it gets.
        """
        if n < 0:
            raise InvalidAddresses(f"{n} blocks cannot be allocated; ask for 0 or more")
        if n > self.room(medium):
            ledgers = self._ledgers if medium is Medium.MIXED else (self._ledgers[medium],)
            raise PoolFull(n, sum(ledger.num_free for ledger in ledgers), sum(ledger.num_cached for ledger in ledgers))
        if medium is Medium.MIXED:
            in_hbm = min(n, self._ledgers[HBM].room)
            in_dram = self.alloc_mem(n - in_hbm, DRAM, owner)  # first: what HBM swaps out would take its room
            return [*self.alloc_mem(in_hbm, HBM, owner), *in_dram]
        ledger = self._ledgers[medium]
        if n > len(ledger.free_list):
            self._make_room(medium, n)
        blocks = ledger.take(n)
        if owner is not None:
            self._owners.add(blocks if medium is HBM else [-block for block in blocks], owner)
        return ledger.name(blocks)

    def free_mem(self, addresses: Sequence[BlockAddress], owner: str | None = None) -> None:
        """Give back one reference on each address; blocks in the index become cached, others free (paper 4.1).

        ``addresses`` are in token order, so that the end of a prefix is evicted before its start. With an owner, the
        references are those allocated with it. All or nothing: raises StaleAddress (also for a double free) or
        ForeignAddress, changing nothing.
        """
        locations = self._refs.freeable(addresses, owner)
        if owner is not None:
            self._owners.forget(locations, owner)
        self._refs.drop(locations)

    def give(self, addresses: Sequence[BlockAddress], owner: str) -> None:
        """Turn references of the caller's into this owner's. Raises like ``free_mem``, and InvalidAddresses for a
        block that is given twice or is somebody's by name already."""
        locations = self._refs.freeable(addresses, None)
        if len(set(locations)) < len(locations) or any(location in self._owners for location in locations):
            raise InvalidAddresses(f"a block of {addresses} is given twice or is somebody's by name already")
        self._owners.add(locations, owner)

    def require_held(self, addresses: Sequence[BlockAddress]) -> None:
        """Raise StaleAddress or ForeignAddress unless somebody holds each of these blocks."""
        self._refs.live(addresses)

    def share(self, addresses: Sequence[BlockAddress]) -> None:
        """Add one reference, the caller's, to each of these held blocks. Raises StaleAddress or ForeignAddress."""
        locations = self._refs.live(addresses)
        self._refs.hold(locations)

    def check_exclusive(self, addresses: Sequence[BlockAddress], owner: str) -> None:
        """Raise unless this owner alone holds these blocks and nobody can find them: like ``give``."""
        self._refs.exclusive(addresses, owner)

    def free_owned_by(self, owner: str) -> int:
        """Give back every reference allocated with this owner (a dead peer, say) and return how many there were."""
        locations = self._owners.of(owner)
        self._owners.forget(locations, owner)
        self._refs.drop(locations)
        return len(locations)

    def owned(self) -> dict[str, int]:
        """How many references each owner has."""
        return self._owners.counts()

    # -- the index ---------------------------------------------------------------------------------------------------

    def insert(
        self, tokens: Tokens, addresses: Addresses, salt: str = "", adapter: str = "", start: int = 0, stop: int = -1
    ) -> list[BlockAddress]:
        """Make ``stop`` whole blocks of ``tokens`` findable (-1: all): the caller holds them, their bytes are there.

        Further addresses are ignored. Returns the duplicates, whose place has another block of the same medium already;
        the caller's references stay, and inserting again changes nothing. The first ``start`` blocks are known to be in
        the index: that saves a look at them. A tenant's quota may cut the end off. Raises StaleAddress, ForeignAddress
        or InvalidAddresses (too few, or under other tokens already), changing nothing.
        """
        size = self.block_size
        count = len(tokens) // size if stop < 0 else stop
        if len(addresses) < count:
            raise InvalidAddresses(f"{len(tokens)} tokens fill {count} blocks, but only {len(addresses)} are given")
        index, space = self._index, self.space(salt, adapter)
        if 0 < start < count and index.quota is None and self.caching:
            last, *fresh = self._refs.live(addresses[start - 1 : count])
            tail = pack(tokens[start * size : count * size], (count - start) * size)
            index.clock += 1
            if index.insert_after(last, tail, space, fresh):
                return []
        if not (locations := self._refs.live(addresses[:count])) or not self.caching:
            return []
        index.clock += 1
        raw = pack(tokens, count * size)
        try:
            if index.quota is not None:
                index.validate(raw, space, locations)
                locations = self._within_quota(raw, locations, space)
            duplicates = index.insert(raw, space, locations) if locations else []
        except ValueError as error:
            raise InvalidAddresses(str(error)) from None
        return [addresses[place] for place in duplicates]

    def match(self, tokens: Tokens, salt: str = "", adapter: str = "") -> Match:
        """Find the longest cached prefix in whole blocks, hold it, and return the lease; the caller ends it.

        It never covers the last token, whose logits somebody is about to need. Blocks come from HBM where they can,
        else from DRAM (paper 4.2).
        """
        found = self.hold(tokens, salt, (len(tokens) - 1) // self.block_size, adapter)
        in_dram = 0
        if self._ledgers[DRAM].capacity:
            in_dram = sum(address.medium is DRAM for address in found.addresses)
        self._lookups.count(len(tokens), found.num_tokens, in_dram * self.block_size)
        return found

    def hold(self, tokens: Tokens, salt: str, limit: int, adapter: str = "") -> Match:
        """Hold the longest cached prefix of at most ``limit`` whole blocks, the last token's too; the caller ends it.

        This is for keys and values that travel; it does not count as a hit or a query.
        """
        space = self.space(salt, adapter)
        known = self.caching and space in self._index.spaces
        limit = min(limit, len(tokens) // self.block_size) if known else 0
        locations = self._index.find(pack(tokens, limit * self.block_size), space, limit) if limit > 0 else []
        hbm, dram = self._ledgers
        if not dram.capacity:
            hbm.hold(locations)
            made = hbm.addresses
            addresses = [made[block] or hbm.address(block) for block in locations]
        else:
            hbm.hold(location for location in locations if location > 0)
            dram.hold(-location for location in locations if location < 0)
            addresses = [hbm.address(location) if location > 0 else dram.address(-location) for location in locations]
        return Match(self.free_mem, addresses, len(locations) * self.block_size)

    def peek(self, tokens: Tokens, salt: str = "", adapter: str = "") -> int:
        """How many tokens ``match`` would find. Holds nothing and changes nothing, not even the order of eviction."""
        return sum(self.peek_media(tokens, salt, adapter)) * self.block_size

    def peek_media(self, tokens: Tokens, salt: str = "", adapter: str = "") -> tuple[int, int]:
        """The same in blocks, as (to be had from HBM, only from DRAM)."""
        limit, space = (len(tokens) - 1) // self.block_size, self.space(salt, adapter)
        if limit <= 0 or space not in self._index.spaces or not self.caching:
            return 0, 0
        found = self._index.find(pack(tokens, limit * self.block_size), space, limit)
        in_dram = sum(location < 0 for location in found)
        return len(found) - in_dram, in_dram

    def delete(self, tokens: Tokens, salt: str = "", adapter: str = "") -> int:
        """Forget the prefix made of the whole blocks of ``tokens`` and all that continues it (paper 4.1).

        Returns how many copies the index lost; 0 if it does not know all of that prefix. Held blocks survive until
        they are freed.
        """
        count = len(tokens) // self.block_size
        return self._refs.forget(self._index.remove(pack(tokens, count * self.block_size), self.space(salt, adapter)))

    def clear(self) -> int:
        """Forget every prefix and return how many copies the index had. Held blocks survive until they are freed."""
        return self._refs.forget(self._index.remove_all())

    def begin_life(self, epoch: int) -> None:
        """Addresses given out before are void, the cache stays. Raises Unavailable while a block is held."""
        if self.held or self._ledgers[DRAM].num_held:
            raise Unavailable(f"{self.held + self._ledgers[DRAM].num_held} blocks of {self.instance} are still held")
        assert epoch > self.epoch, (epoch, self.epoch)
        self.epoch = epoch
        for ledger in self._ledgers:
            ledger.begin_life(epoch)

    def space(self, salt: str, adapter: str = "") -> bytes:
        """What two prefixes must share to meet: model, adapter and cache salt, as one key."""
        return "\0".join((self.model, adapter.replace("\0", ""), salt)).encode()

    def snapshot(self) -> Snapshot:
        """All that is cached now; events of the log with a higher number come on top of it."""
        return Snapshot(self.log.last if self.log is not None else 0, audit.snapshot(self._index))

    def oldest(self, n: int, now: float) -> list[tuple[float, int]]:
        """The n least recently used runs of the index: (seconds since their last use, blocks). Slow: for people."""
        nodes = sorted(audit.nodes(self._index), key=lambda node: node.last_use)[:n]
        return [(now - node.used_at, len(node.ids)) for node in nodes]

    def tick(self, now: float) -> None:
        """Tell the time, in seconds of a monotonic clock; uses from now on are remembered with it."""
        self._index.now = now

    # -- media -------------------------------------------------------------------------------------------------------

    def swap_out(self, num_blocks: int) -> int:
        """Free up to ``num_blocks`` of HBM without losing what is cached: the pool chooses unheld blocks, the least
        recently used first (paper 4.1); in a full DRAM the oldest unheld copies make way for theirs. Returns how many;
        the copies that this takes are in ``swaps``."""
        return len(self._evict(HBM, num_blocks, lossless=True))

    def write_back(self, num_blocks: int) -> int:
        """Order DRAM copies of up to ``num_blocks`` cached HBM blocks that stay where they are, so that they can be
        dropped later without loss. Returns how many."""
        count = min(self.swaps.room_to_spill(num_blocks), self._ledgers[DRAM].num_free)
        return self.swaps.write_back(reclaim.dirty(self._index, count))

    def swap_in(self, addresses: Sequence[BlockAddress]) -> list[BlockAddress]:
        """Order copies of DRAM blocks, which the caller holds, in new HBM blocks, which the caller owns from now on.

        When the bytes have arrived (``swaps.done``) the index points to the HBM copies too, and the caller's references
        on the DRAM blocks are given back: they stay cached. Until then he can free neither. Raises PoolFull,
        StaleAddress or ForeignAddress, changing nothing.
        """
        blocks = [self._ledgers[DRAM].live(address) for address in addresses]
        self._refs.freeable(addresses, None)
        fresh = self.alloc_mem(len(blocks))
        if fresh:
            self.swaps.swap_in(blocks, [address.index for address in fresh])
        return fresh

    @property
    def reclaimable(self) -> int:
        """HBM blocks that can be given away without losing anything: free ones, and those with a DRAM copy."""
        return self._ledgers[HBM].num_free + self._index.both

    # -- truth -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recompute all that is stored twice and assert that it agrees. Slow: for tests and idle moments."""
        for ledger, indexed in zip(self._ledgers, audit.check(self._index), strict=True):
            ledger.check(indexed)
        owned = self._owners.check()
        assert all(self._refs.count(location) > 0 for location in owned), f"an owned block is not held: {owned}"
        self.swaps.check()
        if self._index.quota is not None:
            for space in self._index.spaces.values():
                for count, limit in zip(space.counts, self._index.quota, strict=True):
                    assert limit is None or count <= limit, f"{space.name!r} has {count} cached blocks, {limit=}"

    # -- parts -------------------------------------------------------------------------------------------------------

    def _make_room(self, medium: Medium, n: int) -> None:
        """Take cached blocks until n are free; there must be enough. First what costs nothing or goes to DRAM."""
        ledger = self._ledgers[medium]
        self._evict(medium, n - ledger.num_free)
        if ledger.num_free < n:  # the rest lies above held blocks, which leave the index with it
            for locations in reclaim.evict_subtrees(self._index, medium):
                self.forgotten_subtrees += 1
                before = ledger.num_cached
                self._refs.forget(locations)
                self._evictions += before - ledger.num_cached
                if ledger.num_free >= n + ledger.capacity // 64:  # finding them costs a look at the whole index
                    break
        assert ledger.num_free >= n, f"{ledger.num_free=} < {n=} with {ledger.num_cached=}"

    def _evict(self, medium: Medium, n: int, lossless: bool = False) -> list[int]:
        """Take up to n unheld copies out of a medium; what is in HBM only goes to DRAM if there is room for it."""
        before = self.swaps.spilled
        gone = self._take(reclaim.evict(self._index, medium, n, self._spill, lossless))
        self._evictions -= self.swaps.spilled - before
        return gone

    def _spill(self, block: int) -> int:
        """Where the bytes of an HBM block go that is about to be given away: for it, the oldest in DRAM makes way."""
        if not self._ledgers[DRAM].free_list and self.swaps.room_to_spill(1):
            self._take(reclaim.evict(self._index, DRAM, 1, self._spill))
        return self.swaps.spill(block)

    def _take(self, gone: list[int]) -> list[int]:
        """Unheld copies left the index: their blocks become free."""
        self._evictions += self._refs.forget(gone)
        return gone

    def _within_quota(self, raw: bytes, locations: list[int], name: bytes) -> list[int]:
        """The start of the prefix that the tenant's quota lets in, after its own oldest blocks made way."""
        quota = self._index.quota
        assert quota is not None
        for medium, limit in zip((HBM, DRAM), quota, strict=True):
            if limit is None:
                continue
            known = self._index.find(raw, name, len(locations))
            new = [  # places that would add a copy in this medium
                place
                for place, location in enumerate(locations)
                if (location < 0) == medium and (place >= len(known) or (known[place] < 0) != medium)
            ]
            space = self._index.spaces.get(name)
            surplus = (space.counts[medium] if space is not None else 0) + len(new) - limit
            if surplus > 0 and space is not None:
                self._refs.hold(known)  # the prefix does not make way for its own end
                surplus -= len(self._take(reclaim.evict(self._index, medium, surplus, lambda block: 0, space=space)))
                self._refs.drop(known)
            if surplus > 0:
                locations = locations[: new[max(0, len(new) - surplus)]]
        return locations
