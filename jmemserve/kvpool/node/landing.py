"""The bytes of transfers that come: fetched by workers, written on the owner's thread."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import jax

from jmemserve.errors import TransferError
from jmemserve.kvpool.address import Medium
from jmemserve.kvpool.arena import HostArena
from jmemserve.kvpool.node.tally import Tally
from jmemserve.kvpool.store import PageStore
from jmemserve.kvpool.transfer import WHOLE, Land
from jmemserve.kvpool.transports import PieceSpec, Transport

FETCH_TIMEOUT_S = 30.0


class Lander:
    """``over(land, error or None)`` is called by the owner once the bytes are written, or will never be.

    ``before_write`` enqueues reads that must come before any write to the pages.
    """

    def __init__(
        self,
        store: PageStore,
        arena: HostArena | None,
        workers: Executor,
        post: Callable[[Callable[[], None]], None],
        before_write: Callable[[], None],
        over: Callable[[Land, Exception | None], None],
        tally: Tally,
    ):
        self._store, self._arena, self._before_write = store, arena, before_write
        self._workers, self._post, self._over = workers, post, over
        self._tally = tally

    def land(self, land: Land, transport: Transport, endpoint: Mapping[str, Any]) -> None:
        """Fetch these bytes and write them into their blocks. Raises TransferError if the ticket is not one."""
        layout, count = self._store.layout, len(land.blocks)
        if count not in self._store.sizes:
            raise TransferError(f"{count} blocks came in one piece; pieces have {self._store.sizes}")
        shape = layout.page_shape if land.part == WHOLE else layout.page_shape[2:]
        ticket = land.ticket.get("ticket")
        frames = ticket.get("frames") if isinstance(ticket, Mapping) else None
        if not isinstance(ticket, Mapping) or frames not in (count, count * 2 * layout.num_layers):
            raise TransferError(f"a ticket for {count} blocks is expected, not {land.ticket!r:.200}")
        if land.checked and not any(name in ticket for name in ("sums", "checksum")):
            raise TransferError("the ticket carries no checksums, but they were not waived")
        if len({address.medium for address in land.blocks}) != 1:
            raise TransferError("a piece lands in one medium")
        spec = PieceSpec((count, *shape), layout.dtype, frames)
        self._workers.submit(self._fetch, land, transport, endpoint, dict(ticket), spec)

    def _fetch(
        self,
        land: Land,
        transport: Transport,
        endpoint: Mapping[str, Any],
        ticket: dict[str, Any],
        spec: PieceSpec,
    ) -> None:
        """On a worker."""
        try:
            numbers = [address.index for address in land.blocks]
            array: jax.Array | None = None
            if land.blocks[0].medium is Medium.HBM:
                sharding = self._store.sharding if land.part == WHOLE else self._store.part_sharding
                array = transport.fetch(endpoint, ticket, spec, sharding, FETCH_TIMEOUT_S)
            else:
                assert self._arena is not None, "a block in DRAM without an arena"
                layer, half = divmod(land.part, 2)
                with self._arena.writable(numbers) as slots:
                    where = slots if land.part == WHOLE else [slot[layer, half] for slot in slots]
                    transport.fetch(endpoint, ticket, spec, where, FETCH_TIMEOUT_S)
        except Exception as error:  # whatever it is, it must not be lost on a worker
            caught = error
            self._post(lambda: self._over(land, caught))
            return
        self._post(lambda: self._fetched(land, array, spec.nbytes))

    def _fetched(self, land: Land, array: jax.Array | None, nbytes: int) -> None:
        if array is not None:
            self._before_write()
            numbers = [address.index for address in land.blocks]
            if land.part == WHOLE:
                self._store.scatter(numbers, array)
            else:
                self._store.scatter_part(numbers, *divmod(land.part, 2), array)
        self._tally.bytes_in += nbytes
        self._over(land, None)
