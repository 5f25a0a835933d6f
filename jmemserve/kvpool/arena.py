"""The DRAM of a pool: slots 1 .. num_blocks, one block each, in one of two kinds of host memory.

    NumpyArena     one numpy array; for CPU, where host memory is all there is, and wherever nothing better is there
    PinnedArena    one pinned_host array per block, which a device copies to and from by itself; for GPU and TPU

Memory is not touched at start: pages of a NumpyArena are faulted in when first written, and a PinnedArena allocates
block by block. ``write`` and ``read`` block and are called from worker threads.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.kernels.pages import PageLayout, page_axes

ALIGNMENT = 64  # bytes; what XLA wants of memory that it takes as it is


class HostArena(Protocol):
    """Blocks in host memory by slot number. A block is [L, 2, K, C, H]."""

    nbytes: int

    def write(self, slots: Sequence[int], piece: jax.Array | np.ndarray) -> None:
        """Keep a copy of a piece [n, L, 2, K, C, H]; waits for it."""
        ...

    def read(self, slots: Sequence[int], sharding: NamedSharding) -> jax.Array:
        """The blocks as a piece on a mesh. Later writes to the slots do not show in it."""
        ...

    def slots_of(self, slots: Sequence[int]) -> list[np.ndarray]:
        """The blocks as arrays on the host, to be read before anybody writes to the slots."""
        ...

    def writable(self, slots: Sequence[int]) -> contextlib.AbstractContextManager[list[np.ndarray]]:
        """Arrays to write the blocks into; what is written counts at the end of the block."""
        ...

    def warm_up(self, sharding: NamedSharding, sizes: Sequence[int]) -> None:
        """Compile what ``read`` and ``write`` need for pieces of these sizes."""
        ...


class NumpyArena:
    """A ``HostArena`` in one array."""

    def __init__(self, layout: PageLayout, num_blocks: int):
        self.nbytes = num_blocks * layout.bytes_per_block
        self._blocks = aligned_empty((num_blocks + 1, *layout.page_shape), layout.dtype)

    def write(self, slots: Sequence[int], piece: jax.Array | np.ndarray) -> None:
        if isinstance(piece, np.ndarray):
            for slot, block in zip(slots, piece, strict=True):
                np.copyto(self._blocks[slot], block)
            return
        for shard in piece.addressable_shards:
            if shard.replica_id == 0:
                inner = tuple(shard.index[1:])
                for slot, block in zip(slots, np.asarray(shard.data), strict=True):
                    np.copyto(self._blocks[slot][inner], block)

    def read(self, slots: Sequence[int], sharding: NamedSharding) -> jax.Array:
        copy = aligned_empty((len(slots), *self._blocks.shape[1:]), self._blocks.dtype)
        for place, slot in enumerate(slots):
            np.copyto(copy[place], self._blocks[slot])
        return jax.device_put(copy, sharding).block_until_ready()

    def slots_of(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self._blocks[slot] for slot in slots]

    @contextlib.contextmanager
    def writable(self, slots: Sequence[int]) -> Iterator[list[np.ndarray]]:
        yield [self._blocks[slot] for slot in slots]

    def warm_up(self, sharding: NamedSharding, sizes: Sequence[int]) -> None:
        shape, dtype = self._blocks.shape[1:], self._blocks.dtype
        for size in sizes:
            jax.device_put(aligned_empty((size, *shape), dtype), sharding).block_until_ready()


class PinnedArena:
    """A ``HostArena`` of pinned arrays, sharded like the pages. A slot that was never written has no array."""

    def __init__(self, layout: PageLayout, num_blocks: int, mesh: Mesh):
        self.nbytes = num_blocks * layout.bytes_per_block
        self._shape, self._dtype = layout.page_shape, jnp.dtype(layout.dtype)
        axes = page_axes(True)[1:]
        self._device = NamedSharding(mesh, P(*axes))
        self._pinned = NamedSharding(mesh, P(*axes), memory_kind="pinned_host")
        self._blocks: dict[int, jax.Array] = {}
        self._lock = threading.Lock()
        self._stack = jax.jit(lambda blocks: jnp.stack(blocks), out_shardings=NamedSharding(mesh, P(*page_axes(True))))
        self._split = jax.jit(lambda piece: tuple(piece), out_shardings=self._device)  # sharded as the piece is

    def write(self, slots: Sequence[int], piece: jax.Array | np.ndarray) -> None:
        blocks = tuple(jnp.array(block) for block in piece) if isinstance(piece, np.ndarray) else self._split(piece)
        pinned = jax.device_put(blocks, self._pinned)
        jax.block_until_ready(pinned)
        with self._lock:
            self._blocks.update(zip(slots, pinned, strict=True))

    def read(self, slots: Sequence[int], sharding: NamedSharding) -> jax.Array:
        with self._lock:
            blocks = [self._blocks[slot] for slot in slots]
        piece = self._stack(jax.device_put(blocks, self._device))
        return jax.device_put(piece, sharding).block_until_ready()

    def slots_of(self, slots: Sequence[int]) -> list[np.ndarray]:
        with self._lock:
            return [np.asarray(self._blocks[slot]) for slot in slots]

    @contextlib.contextmanager
    def writable(self, slots: Sequence[int]) -> Iterator[list[np.ndarray]]:
        with self._lock:
            have = {slot: self._blocks[slot] for slot in slots if slot in self._blocks}
        blocks = [
            np.array(have[slot]) if slot in have else np.zeros(self._shape, self._dtype) for slot in slots
        ]  # parts may come one by one, so what is there stays
        yield blocks
        pinned = jax.device_put([jnp.array(block) for block in blocks], self._pinned)
        jax.block_until_ready(pinned)
        with self._lock:
            self._blocks.update(zip(slots, pinned, strict=True))

    def warm_up(self, sharding: NamedSharding, sizes: Sequence[int]) -> None:
        for size in sizes:
            piece = jax.device_put(jnp.zeros((size, *self._shape), self._dtype), sharding)
            self.write([0] * size, piece)
            self.read([0] * size, sharding)
        self._blocks.pop(0, None)


def make_arena(layout: PageLayout, num_blocks: int, mesh: Mesh) -> HostArena:
    """Pinned memory where the devices have it, numpy otherwise and on CPU."""
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        return NumpyArena(layout, num_blocks)
    return PinnedArena(layout, num_blocks, mesh)


def aligned_empty(shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device takes without a copy."""
    kind = jnp.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(kind).reshape(shape)
