"""The bytes of transfers that leave: blocks are read, published and forgotten once they have landed elsewhere.

A bounded number of bytes is staged at a time: the next piece is read when the destination has taken one. Reads of HBM
are enqueued on the owner's thread, in order with the steps; waiting for them and handing them to the transport is the
workers' business.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from jmemserve.errors import TransferError
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.arena import HostArena
from jmemserve.kvpool.node.tally import Tally
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transfer import WHOLE, Granularity, Ship
from jmemserve.kvpool.transports import Piece, Transport

STAGING_BYTES = 128 << 20  # published and not yet landed, at most; one piece may be more


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One piece of one part."""

    transfer_id: str
    key: str
    start: int
    sources: tuple[BlockAddress, ...]  # all of one medium
    part: int
    transport: Transport
    frames: int
    nbytes: int
    checksum: bool


class Shipper:
    """``sent(transfer id, start, stop, part, ticket)`` and ``failed(transfer id, reason)`` are called by the owner."""

    def __init__(
        self,
        store: PageStore,
        arena: HostArena | None,
        workers: Executor,
        post: Callable[[Callable[[], None]], None],
        sent: Callable[[str, int, int, int, dict[str, Any]], None],
        failed: Callable[[str, str], None],
        tally: Tally,
    ):
        self._store, self._arena = store, arena
        self._workers, self._post, self._sent, self._failed = workers, post, sent, failed
        self._queue: deque[_Job] = deque()
        self._staged: dict[str, dict[tuple[int, int], _Job]] = {}  # by transfer, by (start, part): read, not yet landed
        self._staged_bytes = 0
        self._keys = 0
        self._tally = tally

    def ship(self, ship: Ship, transport: Transport, granularity: Granularity, checksum: bool) -> None:
        """Read and publish these blocks, all parts of them, in pieces."""
        layout = self._store.layout
        parts = list(range(2 * layout.num_layers)) if granularity is Granularity.BY_LAYER else [WHOLE]
        frames = 2 * layout.num_layers if granularity is Granularity.BY_REQUEST else 1  # per block
        per_block = layout.bytes_per_block // (1 if parts == [WHOLE] else 2 * layout.num_layers)
        for part in parts:
            for start, stop in self._stretches(ship):
                self._keys += 1
                sources = ship.sources[start:stop]
                key, count = f"{ship.transfer_id}/{self._keys}", stop - start
                job = (ship.transfer_id, key, ship.start + start, sources, part)
                self._queue.append(_Job(*job, transport, count * frames, count * per_block, checksum))
        self.pump()

    def landed(self, transfer_id: str, start: int, part: int) -> None:
        """The destination has this piece."""
        job = self._staged.get(transfer_id, {}).pop((start, part), None)
        if job is not None:
            self._let_go(job)
            self.pump()

    def end(self, transfer_id: str) -> None:
        """Forget all pieces of a transfer."""
        for job in self._staged.pop(transfer_id, {}).values():
            self._let_go(job)
        if any(job.transfer_id == transfer_id for job in self._queue):
            self._queue = deque(job for job in self._queue if job.transfer_id != transfer_id)
        self.pump()

    @property
    def staged_bytes(self) -> int:
        """Read and not yet landed."""
        return self._staged_bytes

    def pump(self) -> None:
        """Read the next waiting piece, if one more may be staged, and come back for the others.

        One at a time: a read may take the owner's thread a while, and what was read before is to be announced first.
        """
        if not self._queue or self._staged_bytes and self._staged_bytes + self._queue[0].nbytes > STAGING_BYTES:
            return
        job = self._queue.popleft()
        self._staged.setdefault(job.transfer_id, {})[job.start, job.part] = job
        self._staged_bytes += job.nbytes
        self._tally.network_calls += job.frames
        self._tally.bytes_out += job.nbytes
        self._workers.submit(self._publish, job, self._read(job))
        if self._queue:
            self._post(self.pump)

    def _stretches(self, ship: Ship) -> list[tuple[int, int]]:
        """Cut where a medium changes on either side, and into sizes that the store has programs for."""
        media = [(a.medium, b.medium) for a, b in zip(ship.sources, ship.targets, strict=True)]
        cuts, start = [], 0
        for place in range(1, len(media) + 1):
            if place == len(media) or media[place] != media[start]:
                cuts += [(start + low, start + high) for low, high in self._store.cuts(place - start)]
                start = place
        return cuts

    def _read(self, job: _Job) -> Piece:
        numbers = [address.index for address in job.sources]
        layer, half = divmod(job.part, 2)
        if job.sources[0].medium is Medium.HBM:
            if job.part == WHOLE:
                return self._store.gather(numbers)
            return self._store.gather_part(numbers, layer, half)
        assert self._arena is not None, "a block in DRAM without an arena"
        slots = self._arena.slots_of(numbers)
        return slots if job.part == WHOLE else [slot[layer, half] for slot in slots]

    def _publish(self, job: _Job, piece: Piece) -> None:
        """On a worker."""
        try:
            ticket = job.transport.publish(job.key, piece, job.frames, job.checksum)
        except Exception as error:  # whatever it is, it must not be lost on a worker
            reason = f"{type(error).__name__}: {error}"
            self._post(lambda: self._failed(job.transfer_id, reason))
            return
        self._post(lambda: self._published(job, ticket))

    def _published(self, job: _Job, ticket: dict[str, Any]) -> None:
        if (job.start, job.part) not in self._staged.get(job.transfer_id, {}):
            job.transport.release(job.key)  # the transfer ended meanwhile
            return
        try:
            stop = job.start + len(job.sources)
            self._sent(job.transfer_id, job.start, stop, job.part, {"way": job.transport.name, "ticket": ticket})
        except TransferError as error:
            self._failed(job.transfer_id, str(error))

    def _let_go(self, job: _Job) -> None:
        self._staged_bytes -= job.nbytes
        job.transport.release(job.key)
        if not self._staged.get(job.transfer_id, True):
            del self._staged[job.transfer_id]
