"""Bytes of blocks from and to the host, wherever they lie."""

from collections.abc import Iterator, Sequence

import numpy as np

from jmemserve.errors import InvalidAddresses
from jmemserve.kvpool.address import BlockAddress, Medium
from jmemserve.kvpool.arena import HostArena, aligned_empty
from jmemserve.kvpool.store import PageStore


def write_blocks(
    store: PageStore, arena: HostArena | None, addresses: Sequence[BlockAddress], blocks: np.ndarray
) -> None:
    """Put [n, L, 2, K, C, H] into n blocks. Raises InvalidAddresses if that is not what the blocks hold."""
    if blocks.shape != (len(addresses), *store.layout.page_shape) or blocks.dtype != store.layout.dtype:
        kind = f"{blocks.dtype}{list(blocks.shape)}"
        raise InvalidAddresses(f"{len(addresses)} blocks of {store.layout} cannot hold {kind}")
    for medium, places in _by_medium(store, addresses):
        numbers = [addresses[place].index for place in places]
        if medium is Medium.HBM:
            store.scatter(numbers, store.to_device(blocks[places]))
        else:
            assert arena is not None, "a block in DRAM without an arena"
            arena.write(numbers, blocks[places])


def read_blocks(store: PageStore, arena: HostArena | None, addresses: Sequence[BlockAddress]) -> np.ndarray:
    """A copy of n blocks: [n, L, 2, K, C, H]. Waits for the device."""
    out = aligned_empty((len(addresses), *store.layout.page_shape), store.layout.dtype)
    for medium, places in _by_medium(store, addresses):
        numbers = [addresses[place].index for place in places]
        if medium is Medium.HBM:
            out[places] = np.asarray(store.gather(numbers))
        else:
            assert arena is not None, "a block in DRAM without an arena"
            for place, block in zip(places, arena.slots_of(numbers), strict=True):
                out[place] = block
    return out


def _by_medium(store: PageStore, addresses: Sequence[BlockAddress]) -> Iterator[tuple[Medium, list[int]]]:
    """Places of blocks of one medium, as many as the store moves at once."""
    for medium in (Medium.HBM, Medium.DRAM):
        places = [place for place, address in enumerate(addresses) if address.medium is medium]
        for start, stop in store.cuts(len(places)):
            yield medium, places[start:stop]
