"""A two-media pool with pretended memory, and a dictionary that says what its index must be.

Every block of the pretended memory holds the prefix whose keys and values were written there. Reads that an order
needs happen when the order is taken, bytes in DRAM are whole only when it is done; in between they are ``BROKEN``.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from jmemserve.errors import InvalidAddresses, PoolFull, StaleAddress
from jmemserve.kvpool import BlockAddress, BlockPool, Match, Medium
from jmemserve.kvpool.events import EventLog
from jmemserve.kvpool.runs import Node
from jmemserve.kvpool.swaps import Swap

C = 2  # tokens per block
HBM, DRAM, MIXED = Medium.HBM, Medium.DRAM, Medium.MIXED
Key = tuple[str, tuple[int, ...]]  # salt and tokens of a prefix
BROKEN: Key = ("bytes on their way", ())
SALTS = ("", "", "b")
OWNERS = ("decode0", "decode1")


def prompt(seed: int, num_blocks: int) -> tuple[int, ...]:
    """Prompts part only at blocks 0, 2 and 5, so that they share long runs."""
    tokens: list[int] = []
    for block in range(num_blocks):
        branch = {0: seed & 1, 2: seed >> 1 & 1, 5: seed >> 2 & 1}.get(block, 0)
        tokens += [block, *[branch] * (C - 1)]
    return tuple(tokens)


@dataclass(eq=False)
class Hold:
    """References that somebody has, one on each address, and the prefixes if the blocks are written."""

    addresses: list[BlockAddress]
    keys: list[Key] = field(default_factory=list)
    owner: str | None = None


class World:
    """Calls the pool as its users may and compares everything after each call."""

    def __init__(
        self,
        num_hbm: int,
        num_dram: int,
        quota: tuple[int | None, int | None] | None = None,
        log: EventLog | None = None,
    ):
        self.pool = BlockPool("a", 1, num_hbm, C, num_dram, quota=quota, log=log)
        self.quota = quota
        self.memory: dict[tuple[Medium, int], Key] = {}
        self.copies: dict[Key, list[int]] = {}  # HBM and DRAM block whose bytes are in place, or 0
        self.pending: dict[Key, int] = {}  # DRAM blocks on their way
        self.holds: list[Hold] = []
        self.leases: list[Match] = []
        self.taken: list[tuple[Swap, list[Key]]] = []
        self.loading: dict[int, list[BlockAddress]] = {}
        self.seen: Counter[str] = Counter()

    @property
    def subtrees(self) -> int:
        return self.pool.forgotten_subtrees

    # -- the truth of the pool, read from the tree ---------------------------------------------------------------------

    def actual(self) -> tuple[dict[Key, list[int]], dict[Key, int]]:
        copies: dict[Key, list[int]] = {}
        pending: dict[Key, int] = {}
        for space in self.pool._index.spaces.values():
            salt = space.name.decode().split("\0")[2]
            stack: list[tuple[Node, tuple[int, ...]]] = [(child, ()) for child in space.root.children.values()]
            while stack:
                node, tokens = stack.pop()
                run = tuple(memoryview(node.run).cast("i"))
                for place in range(len(node.ids)):
                    key = (salt, tokens + run[: (place + 1) * C])
                    dram = node.dram[place] if node.dram else 0
                    copies[key] = [node.hbm[place], max(dram, 0)]
                    if dram < 0:
                        pending[key] = -dram
                stack += [(child, tokens + run) for child in node.children.values()]
        return copies, pending

    def refs(self) -> Counter[BlockAddress]:
        counts: Counter[BlockAddress] = Counter()
        for hold in self.holds:
            counts.update(hold.addresses)
        for lease in self.leases:
            counts.update(lease.addresses)
        for fresh in self.loading.values():
            counts.update(fresh)
        return counts

    # -- comparing -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        pool = self.pool
        pool.check()
        copies, pending = self.actual()
        assert (copies, pending) == (self.copies, self.pending)
        for key, places in copies.items():
            for medium, block in zip((HBM, DRAM), places, strict=True):
                if block:
                    assert self.memory[medium, block] == key, f"{medium.name} block {block} for {key}"
        held = self.refs()
        orders = [dram for _, dram in pool.swaps._spills]
        orders += [dram for swap in pool.swaps._open.values() for dram in swap.dram]
        in_hbm = {address.index for address in held if address.medium is HBM}
        in_dram = {address.index for address in held if address.medium is DRAM} | set(orders)
        stats = pool.stats()
        for medium, now, blocks in ((HBM, stats.hbm, in_hbm), (DRAM, stats.dram, in_dram)):
            cached = {copy[medium] for copy in copies.values()} - blocks - {0}
            assert (now.held, now.cached) == (len(blocks), len(cached)), f"{medium.name}: {now}"
            assert now.free + now.held + now.cached == now.capacity
        assert sum(pool._ledgers[HBM].refs) + sum(pool._ledgers[DRAM].refs) == held.total() + len(orders)
        assert all(pool.address(address.index, address.medium) == address for address in held)

    def settle_losses(self, before: int, lossless: bool = False) -> None:
        """After room was made: see that only what may go is gone."""
        copies, pending = self.actual()
        held = self.refs()
        assert set(copies) <= set(self.copies), "a prefix appeared"
        for key, (hbm, dram) in self.copies.items():
            left = copies.get(key)
            if left is None:
                assert not lossless, f"{key} is lost"
            else:
                assert left[HBM] in (hbm, 0) and left[DRAM] in (dram, 0), f"{key}: {hbm=} {dram=} {left=}"
            for medium, block in ((HBM, hbm), (DRAM, dram)):
                if block and (left is None or left[medium] == 0):
                    is_held = held[self.pool.address(block, medium)] > 0
                    assert not is_held or (left is None and self.subtrees > before), f"held {medium} {block} left"
            if left is not None and key in self.pending:
                assert pending.get(key) == self.pending[key], f"{key} is expected no more"
        for key in pending:
            assert key in self.pending or self.copies[key][HBM], f"{key} is expected from nowhere"
        self.seen["lost"] += len(self.copies) - len(copies)
        self.copies, self.pending = copies, pending

    def unchanged(self) -> None:
        assert self.actual() == (self.copies, self.pending)

    def keys(self, tokens: tuple[int, ...], salt: str) -> list[Key]:
        return [(salt, tokens[: (i + 1) * C]) for i in range(len(tokens) // C)]

    def expected(self, tokens: tuple[int, ...], salt: str) -> list[BlockAddress]:
        found = []
        for key in self.keys(tokens, salt):
            hbm, dram = self.copies.get(key, (0, 0))
            if not hbm and not dram:
                break
            found.append(self.pool.address(hbm) if hbm else self.pool.address(dram, DRAM))
        return found

    def forget_below(self, key: Key) -> int:
        """A prefix and all that continues it leave the dictionary; how many copies they had."""
        gone = [k for k in self.copies if k[0] == key[0] and k[1][: len(key[1])] == key[1]]
        self.pending = {k: dram for k, dram in self.pending.items() if k not in gone}
        return sum(sum(block > 0 for block in self.copies.pop(k)) for k in gone)

    # -- references ----------------------------------------------------------------------------------------------------

    def get(self, n: int, medium: Medium, owner: str | None = None) -> list[BlockAddress] | None:
        """Allocate, or see that it is refused rightly."""
        held = self.refs()
        orders = sum(len(swap.dram) for swap in self.pool.swaps._open.values() if swap.out)
        assert self.pool.room(HBM) == self.pool.capacity - len({a for a in held if a.medium is HBM}), orders
        before = self.subtrees
        if n > self.pool.room(medium):
            with pytest.raises(PoolFull):
                self.pool.alloc_mem(n, medium, owner)
            self.unchanged()
            return None
        addresses = self.pool.alloc_mem(n, medium, owner)
        assert len(set(addresses)) == n and not held.keys() & set(addresses)
        if medium is MIXED:
            in_hbm = sum(address.medium is HBM for address in addresses)
            assert [address.medium for address in addresses] == [HBM] * in_hbm + [DRAM] * (n - in_hbm)
        else:
            assert all(address.medium is medium for address in addresses)
        self.settle_losses(before)
        return addresses

    def alloc(self, n: int, medium: Medium, owner: str | None) -> None:
        addresses = self.get(n, medium, owner)
        if addresses is not None:
            self.holds.append(Hold(addresses, owner=owner))

    def free(self, pick: int, cut: int) -> None:
        if self.holds:
            hold = self.holds.pop(pick % len(self.holds))
            self.pool.free_mem(hold.addresses[cut:], hold.owner)
            if hold.addresses[:cut]:
                self.holds.append(Hold(hold.addresses[:cut], hold.keys[:cut], hold.owner))
            elif hold.addresses and self.refs()[hold.addresses[0]] == 0:
                with pytest.raises(StaleAddress):
                    self.pool.free_mem(hold.addresses, hold.owner)

    def share(self, pick: int) -> None:
        if self.holds:
            hold = self.holds[pick % len(self.holds)]
            self.pool.share(hold.addresses)
            self.holds.append(Hold(list(hold.addresses), list(hold.keys)))

    def give(self, pick: int, owner: str) -> None:
        if not self.holds:
            return
        hold = self.holds[pick % len(self.holds)]
        if hold.owner is not None:
            return
        if any(address in other.addresses for other in self.holds if other.owner for address in hold.addresses):
            with pytest.raises(InvalidAddresses):
                self.pool.give(hold.addresses, owner)
            return
        self.pool.give(hold.addresses, owner)
        hold.owner = owner

    def free_owned_by(self, owner: str) -> None:
        mine = [hold for hold in self.holds if hold.owner == owner]
        assert self.pool.free_owned_by(owner) == sum(len(hold.addresses) for hold in mine)
        self.holds = [hold for hold in self.holds if hold.owner != owner]

    # -- prefixes ------------------------------------------------------------------------------------------------------

    def write(self, addresses: list[BlockAddress], keys: list[Key]) -> None:
        """Put bytes into blocks, which is device work: orders are taken first."""
        self.take_orders()
        for address, key in zip(addresses, keys, strict=True):
            self.memory[address.medium, address.index] = key

    def insert(self, hold: Hold, tokens: tuple[int, ...], salt: str, start: int = 0) -> None:
        keys = self.keys(tokens, salt)
        if self.quota is not None:
            self.pool.insert(tokens, hold.addresses, salt, start=start)
            return self.settle_insert(keys, hold.addresses)
        expected = []
        for key, address in zip(keys, hold.addresses, strict=False):
            here = self.copies.setdefault(key, [0, 0])
            known = here[address.medium] or (address.medium is DRAM and self.pending.get(key, 0))
            if not known:
                here[address.medium] = address.index
            elif known != address.index:
                expected.append(address)
        assert self.pool.insert(tokens, hold.addresses, salt, start=start) == expected
        self.seen["duplicates"] += len(expected)

    def settle_insert(self, keys: list[Key], addresses: list[BlockAddress]) -> None:
        """With a quota: what is new was given, what is gone is the tenant's own and unheld."""
        copies, pending = self.actual()
        held, salt = self.refs(), keys[0][0] if keys else ""
        given = dict(zip(keys, addresses, strict=False))
        for key in copies.keys() | self.copies.keys():
            old, new = self.copies.get(key, [0, 0]), copies.get(key, [0, 0])
            for medium in (HBM, DRAM):
                if new[medium] and new[medium] != old[medium]:
                    assert given[key] == self.pool.address(new[medium], medium)
                if old[medium] and new[medium] != old[medium]:
                    assert key[0] == salt and not held[self.pool.address(old[medium], medium)], f"{key} made way"
                    self.seen["made way"] += 1
        self.seen["left out"] += sum(key not in copies for key in keys)
        self.copies, self.pending = copies, pending

    def serve(self, seed: int, n: int, salt: str, medium: Medium) -> None:
        """What a request does: hold what is known, allocate what lacks, write it, index all."""
        tokens = prompt(seed, n)
        lease = self.pool.hold(tokens, salt, n)
        assert list(lease.addresses) == self.expected(tokens, salt)
        self.leases.append(lease)
        found = len(lease.addresses)
        self.seen["hits"] += found
        self.seen["mixed"] += len({address.medium for address in lease.addresses}) == 2
        fresh = self.get(n - found, medium)
        self.leases.remove(lease)
        if fresh is None:
            return lease.release()
        hold = Hold([*lease.take(), *fresh], self.keys(tokens, salt))
        self.holds.append(hold)
        self.write(fresh, hold.keys[found:])
        self.insert(hold, tokens, salt, start=found if seed & 8 else 0)

    def compute_again(self, seed: int, n: int, salt: str, medium: Medium) -> None:
        """Two who compute the same at once: every block is fresh."""
        tokens = prompt(seed, n)
        fresh = self.get(n, medium)
        if fresh is not None:
            hold = Hold(fresh, self.keys(tokens, salt))
            self.holds.append(hold)
            self.write(fresh, hold.keys)
            self.insert(hold, tokens, salt)

    def insert_again(self, pick: int) -> None:
        written = [hold for hold in self.holds if hold.keys and hold.addresses]
        if written:
            hold = written[pick % len(written)]
            salt, tokens = hold.keys[-1]
            if self.keys(tokens, salt) == hold.keys:  # starts at the first block
                self.insert(hold, tokens, salt)

    def insert_wrongly(self, pick: int) -> None:
        """Too few, given twice, or under other tokens: refused, and nothing changes."""
        lists = [hold for hold in self.holds if hold.addresses]
        if not lists:
            return
        addresses = lists[pick % len(lists)].addresses
        wrong = [(prompt(0, len(addresses) + 1), addresses), ((77,) * 2 * C, [addresses[0]] * 2)]
        indexed = {(m, block) for blocks in self.copies.values() for m, block in enumerate(blocks) if block}
        if any((address.medium, address.index) in indexed for address in addresses):
            wrong.append(((77,) * len(addresses) * C, addresses))
        for tokens, given in wrong:
            with pytest.raises(InvalidAddresses):
                self.pool.insert(tokens, given)
            self.unchanged()

    def match(self, seed: int, n: int, salt: str) -> None:
        tokens = (*prompt(seed, n), 0)
        expected = self.expected(tokens, salt)
        in_dram = sum(address.medium is DRAM for address in expected)
        assert self.pool.peek_media(tokens, salt) == (len(expected) - in_dram, in_dram)
        lease = self.pool.match(tokens, salt)
        assert list(lease.addresses) == expected
        keys = self.keys(tokens, salt)
        for address, key in zip(expected, keys, strict=False):
            assert self.memory[address.medium, address.index] == key
        self.leases.append(lease)

    def release(self, pick: int) -> None:
        if self.leases:
            lease = self.leases.pop(pick % len(self.leases))
            lease.release()
            lease.release()

    def take_lease(self, pick: int) -> None:
        if self.leases:
            self.holds.append(Hold(self.leases.pop(pick % len(self.leases)).take()))

    def delete(self, seed: int, n: int, salt: str) -> None:
        tokens = prompt(seed, n)
        key = (salt, tokens)
        count = self.forget_below(key) if key in self.copies else 0
        assert self.pool.delete(tokens, salt) == count

    def clear(self) -> None:
        count = sum(sum(block > 0 for block in blocks) for blocks in self.copies.values())
        assert self.pool.clear() == count
        self.copies, self.pending = {}, {}

    # -- media ---------------------------------------------------------------------------------------------------------

    def swap_out(self, n: int) -> None:
        free = self.pool.free
        count = self.pool.swap_out(n)
        assert count <= n and self.pool.free == free + count
        copies, _ = self.actual()
        lost = set(self.copies) - set(copies)
        assert not lost or self.pool.stats().dram.free == 0, f"{lost} made way without need"
        self.settle_losses(self.subtrees, lossless=not lost)

    def write_back(self, n: int) -> None:
        count = self.pool.write_back(n)
        copies, pending = self.actual()
        assert copies == self.copies and len(pending) == len(self.pending) + count <= len(self.pending) + n
        self.settle_losses(self.subtrees, lossless=True)
        self.seen["written back"] += count

    def swap_in(self, pick: int) -> None:
        """Somebody who holds blocks in DRAM wants them in HBM."""
        lists = [h for h in self.holds if h.owner is None and any(a.medium is DRAM for a in h.addresses)]
        if not lists:
            return
        hold = lists[pick % len(lists)]
        there = [address for address in hold.addresses if address.medium is DRAM]
        before = self.subtrees
        if len(there) > self.pool.room():
            with pytest.raises(PoolFull):
                self.pool.swap_in(there)
            return self.unchanged()
        fresh = self.pool.swap_in(there)
        self.settle_losses(before)
        hold.addresses = [address for address in hold.addresses if address.medium is HBM]
        hold.keys = []
        self.loading[self.pool.swaps.open_orders()[-1].number] = fresh

    def take_orders(self) -> None:
        for swap in self.pool.swaps.take():
            if swap.out:
                self.taken.append((swap, [self.memory[HBM, block] for block in swap.hbm]))
                self.memory.update({(DRAM, block): BROKEN for block in swap.dram})
            else:
                self.taken.append((swap, [self.memory.get((DRAM, block), BROKEN) for block in swap.dram]))
                self.memory.update({(HBM, block): BROKEN for block in swap.hbm})

    def end(self, pick: int, well: bool) -> None:
        """One order that was taken is over."""
        if not self.taken:
            return
        swap, read = self.taken.pop(pick % len(self.taken))
        self.seen[f"{'done' if well else 'failed'} {'out' if swap.out else 'in'}"] += len(swap.dram)
        self.take_orders()  # before anything is written to the pages
        if well:
            targets = [(DRAM, block) for block in swap.dram] if swap.out else [(HBM, block) for block in swap.hbm]
            self.memory.update(zip(targets, read, strict=True))
        if swap.out:
            self.end_out(swap, well)
        else:
            self.end_in(swap, well)

    def end_out(self, swap: Swap, well: bool) -> None:
        (self.pool.swaps.done if well else self.pool.swaps.failed)(swap)
        for dram in swap.dram if well else reversed(swap.dram):
            key = next((key for key, block in self.pending.items() if block == dram), None)
            if key is None:
                continue
            del self.pending[key]
            if well and not self.is_full(key[0], DRAM):
                self.copies[key][DRAM] = dram
            elif not self.copies[key][HBM]:
                self.forget_below(key)

    def end_in(self, swap: Swap, well: bool) -> None:
        fresh = self.loading.pop(swap.number)
        if well:
            self.pool.swaps.done(swap)
            for address, dram in zip(fresh, swap.dram, strict=True):
                key = next((key for key, blocks in self.copies.items() if blocks[DRAM] == dram), None)
                if key is not None and not self.copies[key][HBM] and not self.is_full(key[0], HBM):
                    self.copies[key][HBM] = address.index
            self.holds.append(Hold(fresh))
            return
        self.pool.swaps.failed(swap)
        for dram in reversed(swap.dram):
            key = next((key for key, blocks in self.copies.items() if blocks[DRAM] == dram), None)
            if key is not None:
                self.forget_below(key)

    def is_full(self, salt: str, medium: Medium) -> bool:
        limit = self.quota[medium] if self.quota is not None else None
        mine = [blocks for key, blocks in self.copies.items() if key[0] == salt]
        return limit is not None and sum(blocks[medium] > 0 for blocks in mine) >= limit

    def enable(self, enabled: bool) -> None:
        self.pool.swaps.enabled = enabled

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everybody gives back what he has: nothing is held any more."""
        self.take_orders()
        while self.taken:
            self.end(0, well=True)
        while self.leases:
            self.release(0)
        while self.holds:
            self.free(0, 0)
        self.check()
        stats = self.pool.stats()
        assert stats.hbm.held == stats.dram.held == 0 and not self.pool.owned() and len(self.pool.swaps) == 0


def random_calls(world: World, random: Random) -> Callable[[], None]:
    """One call in the proportions of a busy server."""
    pick, n, seed, salt = random.randrange(100), random.randrange(8), random.randrange(16), random.choice(SALTS)
    medium, owner = random.choice((HBM, HBM, HBM, DRAM, MIXED)), random.choice(OWNERS)
    calls: dict[Callable[[], None], int] = {
        lambda: world.serve(seed, n, salt, medium): 16,
        lambda: world.compute_again(seed, n, salt, medium): 3,
        lambda: world.insert_again(pick): 2,
        lambda: world.insert_wrongly(pick): 1,
        lambda: world.alloc(n, medium, owner if pick < 30 else None): 3,
        lambda: world.free(pick, random.choice((0, 0, 0, 0, 1, 2))): 20,
        lambda: world.share(pick): 1,
        lambda: world.give(pick, owner): 1,
        lambda: world.free_owned_by(owner): 1,
        lambda: world.match(seed, n, salt): 8,
        lambda: world.release(pick): 7,
        lambda: world.take_lease(pick): 2,
        lambda: world.delete(seed, n, salt): 1,
        lambda: world.swap_out(n): 3,
        lambda: world.write_back(n): 3,
        lambda: world.swap_in(pick): 8,
        lambda: world.take_orders(): 6,
        lambda: world.end(pick, well=pick % 8 > 0): 14,
        lambda: world.enable(pick < 80): 1,
    }
    if random.random() < 0.002:
        return world.clear
    if len(world.holds) + len(world.leases) > 3 and random.random() < 0.5:
        return lambda: world.free(pick, 0) if world.holds and pick < 70 else world.release(pick)
    return random.choices(list(calls), list(calls.values()))[0]
