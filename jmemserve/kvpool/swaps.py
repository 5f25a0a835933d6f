"""Copies between the two media of one instance: ordered here, made by whoever owns the arrays.

    HBM block ──spill or write_back──▶ order ──taken──▶ on its way ──done──▶ findable in DRAM
                                                               └──failed──▶ as if it had never been

An order must be taken before any other work is given to the device: its HBM block may have been freed with it, and
the bytes are read first because the read is enqueued first.
"""

import dataclasses
from collections import Counter

from jmemserve.kvpool.index import TokenIndex
from jmemserve.kvpool.ledger import Ledger
from jmemserve.kvpool.references import References

WRITE_BACK_BELOW = 0.1  # share of HBM that can be given away without loss; below it copies to DRAM are made ahead
WRITE_BACK_BLOCKS = 16  # per turn of the pool's owner
MAX_ON_THE_WAY = 256  # blocks going to DRAM at once; each keeps a copy on the device until it has arrived


@dataclasses.dataclass(frozen=True, slots=True)
class Swap:
    """Copy the i-th block of one list to the i-th of the other; to DRAM if ``out``, else to HBM."""

    number: int
    out: bool
    hbm: tuple[int, ...]
    dram: tuple[int, ...]


class Swaps:
    """The orders of one pool. Invariant: each of their DRAM blocks has a reference of theirs until they end."""

    def __init__(self, ledgers: tuple[Ledger, Ledger], index: TokenIndex, refs: References):
        self._hbm, self._dram = ledgers
        self._index = index
        self._refs = refs
        self._spills: list[tuple[int, int]] = []  # (HBM block, DRAM block), not yet in an order
        self._orders: list[Swap] = []  # not yet taken
        self._open: dict[int, Swap] = {}  # not yet over
        self._number = 0
        self._going_out = 0
        self.enabled = True  # False: it costs less to compute again, so nothing goes to DRAM by itself
        self.spilled = self.swapped_out = self.swapped_in = self.failed_blocks = 0

    def __len__(self) -> int:
        """Orders that are not over."""
        return len(self._open) + bool(self._spills)

    def room_to_spill(self, n: int) -> int:
        """How many of n blocks may start their way to DRAM now, if DRAM blocks can be had for them."""
        if not self.enabled:
            return 0
        return max(0, min(n, self._dram.room, MAX_ON_THE_WAY - self._going_out))

    def spill(self, block: int) -> int:
        """Name the free DRAM block for the bytes of an HBM block that is about to be given away; 0 if there is none."""
        if not self._dram.free_list or not self.room_to_spill(1):
            return 0
        (dram,) = self._dram.take(1)
        self._spills.append((block, dram))
        self._going_out += 1
        self.spilled += 1
        return dram

    def write_back(self, blocks: list[int]) -> int:
        """Order DRAM copies of these cached HBM blocks as long as there are free DRAM blocks; return how many."""
        count = 0
        for block in blocks:
            dram = self.spill(block)
            if not dram:
                break
            self.spilled -= 1
            self._index.expect(block, dram)
            count += 1
        return count

    def swap_in(self, dram: list[int], hbm: list[int]) -> Swap:
        """Order copies of held DRAM blocks in held HBM blocks."""
        self._flush_spills()  # they may still have to read these HBM blocks
        self._refs.inbound.update([*hbm, *(-block for block in dram)])
        return self._order(False, tuple(hbm), tuple(dram))

    def open_orders(self) -> list[Swap]:
        """Every order that is not over, oldest first."""
        self._flush_spills()
        return list(self._open.values())

    def take(self) -> list[Swap]:
        """Every order since the last call. The caller enqueues them in this order, before anything else."""
        self._flush_spills()
        orders, self._orders = self._orders, []
        return orders

    def done(self, swap: Swap) -> None:
        """All bytes of the order are in place (for one into HBM: ordered before all that could read them)."""
        self._close(swap)
        if swap.out:
            self.swapped_out += len(swap.dram)
            for dram in swap.dram:
                self._refs.forget(self._index.arrived(dram))
                if self._dram.drop(dram) == 0:
                    self._refs.settle(-dram)
            return
        self.swapped_in += len(swap.dram)
        for dram, block in zip(swap.dram, swap.hbm, strict=True):
            self._index.swapped_in(dram, block)
        for dram in reversed(swap.dram):
            if self._dram.drop(dram) == 0:
                self._refs.settle(-dram)

    def failed(self, swap: Swap) -> None:
        """The bytes will not come. To DRAM: forget the copies. To HBM: give both ends back; the prefix is forgotten,
        since its copy in DRAM cannot be read."""
        self._close(swap)
        self.failed_blocks += len(swap.dram)
        for dram, block in zip(reversed(swap.dram), reversed(swap.hbm), strict=True):
            self._refs.forget(self._index.lost(dram) if swap.out else self._index.forget(-dram))
            if not swap.out and self._hbm.drop(block) == 0:
                self._refs.settle(block)
            if self._dram.drop(dram) == 0:
                self._refs.settle(-dram)

    def check(self) -> None:
        """Assert that every DRAM block of an order is held."""
        pending = [dram for _, dram in self._spills] + [dram for swap in self._open.values() for dram in swap.dram]
        assert all(self._dram.refs[dram] > 0 for dram in pending), f"an order's DRAM block is not held: {pending}"
        inbound = Counter(b for swap in self._open.values() if not swap.out for b in swap.hbm)
        inbound.update(-b for swap in self._open.values() if not swap.out for b in swap.dram)
        assert inbound == self._refs.inbound, f"{inbound=} != {self._refs.inbound=}"
        assert all(self._hbm.refs[b] > 0 for b in inbound if b > 0), f"an order's HBM block is not held: {inbound}"
        going = len(self._spills) + sum(len(swap.dram) for swap in self._open.values() if swap.out)
        assert going == self._going_out, f"{going=} != {self._going_out=}"

    def _flush_spills(self) -> None:
        if self._spills:
            spills, self._spills = self._spills, []
            self._order(True, tuple(hbm for hbm, _ in spills), tuple(dram for _, dram in spills))

    def _order(self, out: bool, hbm: tuple[int, ...], dram: tuple[int, ...]) -> Swap:
        self._number += 1
        swap = Swap(self._number, out, hbm, dram)
        self._open[swap.number] = swap
        self._orders.append(swap)
        return swap

    def _close(self, swap: Swap) -> None:
        found = self._open.pop(swap.number, None)
        assert found is swap, f"{swap} is over or was never ordered"
        if swap.out:
            self._going_out -= len(swap.dram)
            return
        for location in (*swap.hbm, *(-block for block in swap.dram)):
            self._refs.inbound[location] -= 1
            if not self._refs.inbound[location]:
                del self._refs.inbound[location]
