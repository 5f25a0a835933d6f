"""The bytes that move between the two media of one instance, with a checksum that stays beside each block in DRAM."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import jax
import numpy as np

from jmemserve.errors import CorruptBlock, JmemserveError, TransferError
from jmemserve.kvpool.arena import HostArena
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.swaps import Swap, Swaps


@dataclasses.dataclass(slots=True)
class _Waiting:
    """Somebody who wants to know when these orders are over."""

    numbers: set[int]
    call: Callable[[Exception | None], None]
    error: Exception | None = None


class Swapper:
    """Carries out the orders of one pool. ``flush`` comes before any other write to the pages."""

    def __init__(
        self,
        swaps: Swaps,
        store: PageStore,
        arena: HostArena | None,
        workers: Executor,
        post: Callable[[Callable[[], None]], None],
    ):
        self._swaps, self._store, self._arena = swaps, store, arena
        self._workers, self._post = workers, post
        self._sums: dict[int, int] = {}  # of DRAM blocks that were swapped out
        self._left: dict[int, int] = {}  # pieces of each order that are not over
        self._errors: dict[int, Exception] = {}
        self._waiting: list[_Waiting] = []
        self.on_swapped_in: Callable[[int, float], None] = lambda blocks, seconds: None  # for who weighs costs

    def flush(self) -> None:
        """Enqueue all orders that were given."""
        for swap in self._swaps.take():
            pieces = self._store.cuts(len(swap.hbm))
            self._left[swap.number] = len(pieces)
            for start, stop in pieces:
                hbm, dram = swap.hbm[start:stop], swap.dram[start:stop]
                if swap.out:
                    piece = self._store.gather(hbm)  # enqueued now, before anybody writes there
                    self._workers.submit(self._out, swap, dram, piece)
                else:
                    self._workers.submit(self._in, swap, hbm, dram)

    def when_over(self, swaps: Iterable[Swap], call: Callable[[Exception | None], None]) -> None:
        """Call when all these orders are over, with the first error among them."""
        waiting = _Waiting({swap.number for swap in swaps}, call)
        known = {swap.number for swap in self._swaps.open_orders()}
        assert waiting.numbers <= known, f"orders {waiting.numbers - known} are over: ask before the owner does more"
        if waiting.numbers:
            self._waiting.append(waiting)
        else:
            call(None)

    def idle(self) -> bool:
        """No order is under way."""
        return not self._left

    def _out(self, swap: Swap, dram: tuple[int, ...], piece: jax.Array) -> None:
        """On a worker: wait for the bytes and keep them."""
        try:
            assert self._arena is not None, "a swap without an arena"
            self._arena.write(dram, piece)
            sums = self._store.checksums(piece)
        except Exception as error:
            caught = error
            self._post(lambda: self._over(swap, caught))
            return
        self._post(lambda: self._came_out(swap, dram, sums))

    def _came_out(self, swap: Swap, dram: tuple[int, ...], sums: np.ndarray) -> None:
        self._sums.update(zip(dram, sums.tolist(), strict=False))
        self._over(swap, None)

    def _in(self, swap: Swap, hbm: tuple[int, ...], dram: tuple[int, ...]) -> None:
        """On a worker: bring the bytes to the device and see that they are what was kept."""
        began = time.monotonic()
        try:
            assert self._arena is not None, "a swap without an arena"
            piece = self._arena.read(dram, self._store.sharding)
            sums = self._store.checksums(piece).tolist()
        except Exception as error:
            caught = error
            self._post(lambda: self._over(swap, caught))
            return
        seconds = time.monotonic() - began
        self._post(lambda: self._came_in(swap, hbm, dram, piece, sums, seconds))

    def _came_in(
        self,
        swap: Swap,
        hbm: tuple[int, ...],
        dram: tuple[int, ...],
        piece: jax.Array,
        sums: list[int],
        seconds: float,
    ) -> None:
        self.on_swapped_in(len(dram), seconds)
        for block, got in zip(dram, sums, strict=False):
            kept = self._sums.get(block, got)  # what landed in DRAM by a transfer was checked then
            if kept != got:
                self._over(swap, CorruptBlock(f"DRAM block {block} was kept with checksum {kept} and reads as {got}"))
                return
        self.flush()
        self._store.scatter(hbm, piece)
        self._over(swap, None)

    def forget(self, dram: Iterable[int]) -> None:
        """Other bytes are written to these DRAM blocks."""
        for block in dram:
            self._sums.pop(block, None)

    def _over(self, swap: Swap, error: Exception | None) -> None:
        """One piece of an order is over."""
        if error is not None:
            self._errors.setdefault(swap.number, error)
        self._left[swap.number] -= 1
        if self._left[swap.number]:
            return
        del self._left[swap.number]
        first = self._errors.pop(swap.number, None)
        if first is None:
            self._swaps.done(swap)
        else:
            self._swaps.failed(swap)
        for waiting in [waiting for waiting in self._waiting if swap.number in waiting.numbers]:
            waiting.numbers.remove(swap.number)
            waiting.error = waiting.error or first
            if not waiting.numbers:
                self._waiting.remove(waiting)
                error = waiting.error
                waiting.call(
                    error if error is None or isinstance(error, JmemserveError) else TransferError(repr(error))
                )
