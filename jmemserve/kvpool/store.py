"""The arrays behind the addresses: one pool of pages on one mesh, donated to every step.

The store has the only name of the pages. Reads that must see old contents are enqueued before the step that donates
the pages; dispatch order is enough, so every call but ``checksums`` comes from the owner's own thread.

    PageStore        the devices of one process
    SpanningStore    devices of several processes, which all make the same calls; see ``engine/replay.py``
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.kernels import block_moves
from jmemserve.kernels import pages as layouts
from jmemserve.kernels.choice import Choice
from jmemserve.kernels.pages import PageLayout, Pages

PIECES = (1, 4, 16, 64)  # blocks per gather or scatter: few sizes, compiled once
PIECE_BYTES = 32 << 20  # a piece of several blocks is at most so large
TRUSTED = ("cpu", "xla")  # moves that are not tried out


class PageStore:
    """``num_blocks`` usable pages (numbers 1 to num_blocks; page 0 takes the writes of padding).

    A *piece* is [n, L, 2, K, C, H] with n of ``sizes``; a *part* of it, [n, K, C, H], is one layer's keys or values.
    """

    def __init__(self, layout: PageLayout, num_blocks: int, mesh: Mesh, moved_by: str | None = None):
        """``moved_by``: which of ``block_moves``; None: the first that works."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.sizes = tuple(size for size in PIECES if size == 1 or size * layout.bytes_per_block <= PIECE_BYTES)
        self.pages_sharding = NamedSharding(mesh, P(*layouts.page_axes(layout.aggregated)))
        self._split, self._split_part = piece_shardings(mesh)  # of what is written into the pages
        self.piece_mesh = mesh  # where others see pieces and parts, so sharded:
        self.sharding, self.part_sharding = self._split, self._split_part
        # Before the pages fill the memory.
        self.moved_by = choose_moves(layout, mesh) if moved_by is None else Choice(moved_by)
        self._moves = block_moves(mesh)[self.moved_by.name]
        self.pages: Pages = jax.jit(lambda: layout.zeros(num_blocks + 1), out_shardings=self.pages_sharding)()
        everywhere = NamedSharding(mesh, P())
        self._put = lambda numbers: self.place(np.asarray(numbers, np.int32), everywhere)
        self._make_gathers(self.sharding, self.part_sharding)
        self._scatter = jax.jit(self._moves.scatter_blocks, donate_argnums=0, out_shardings=self.pages_sharding)
        self._scatter_part = jax.jit(self._moves.scatter_part, donate_argnums=0, out_shardings=self.pages_sharding)
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._sums = jax.jit(layouts.block_checksums, static_argnums=2)

    def _make_gathers(self, piece: NamedSharding, part: NamedSharding) -> None:
        fold = self.layout.fold
        self._gather = jax.jit(partial(self._moves.gather_blocks, fold=fold), out_shardings=piece)
        self._gather_part = jax.jit(partial(self._moves.gather_part, fold=fold), out_shardings=part)

    def place(self, array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        """Put an array onto the mesh of the pages."""
        return jax.device_put(array, sharding)

    def argument(self, array: np.ndarray) -> jax.Array | np.ndarray:
        """An array of the host for a compiled program on the mesh of the pages; nobody may write to it any more.

        Of one process it is given as it is: the call itself copies it, at a fraction of what a device_put takes.
        """
        return array

    @property
    def checksum_kind(self) -> str:
        """Two stores can compare checksums if this is equal."""
        return "xxh3" if self._on_cpu else "sum"

    @property
    def nbytes(self) -> int:
        """Of all pages, on all devices together."""
        return sum(array.nbytes for array in jax.tree.leaves(self.pages))

    def cuts(self, count: int) -> list[tuple[int, int]]:
        """Cut ``count`` blocks into stretches (start, stop) of the sizes that there are programs for."""
        stretches, start = [], 0
        for size in reversed(self.sizes):
            while count - start >= size:
                stretches.append((start, start + size))
                start += size
        return stretches

    def gather(self, numbers: Sequence[int]) -> jax.Array:
        """A copy of these blocks, as many as one of ``sizes``: [n, L, 2, K, C, H]."""
        assert len(numbers) in self.sizes, f"{len(numbers)} blocks are none of the pieces {self.sizes}"
        return self._gather(self.pages, self._put(numbers))

    def scatter(self, numbers: Sequence[int], piece: jax.Array | np.ndarray) -> None:
        """Write a piece into these blocks, whatever mesh it lies on."""
        assert piece.shape == (len(numbers), *self.layout.page_shape), (piece.shape, len(numbers), self.layout)
        self.pages = self._scatter(self.pages, self._put(numbers), self.place(piece, self._split))

    def gather_part(self, numbers: Sequence[int], layer: int, half: int) -> jax.Array:
        """A copy of one layer's keys (half 0) or values (1) of these blocks: [n, K, C, H]."""
        if isinstance(self.pages, tuple):
            return self._gather_part(self.pages[layer], self._put(numbers), self._put(half))
        return self._gather_part(self.pages, self._put(numbers), self._put(layer), self._put(half))

    def scatter_part(self, numbers: Sequence[int], layer: int, half: int, part: jax.Array | np.ndarray) -> None:
        """Write one layer's keys or values of these blocks."""
        numbers_, part = self._put(numbers), self.place(part, self._split_part)
        if isinstance(self.pages, tuple):
            own = self._scatter_part(self.pages[layer], numbers_, part, self._put(half))
            self.pages = (*self.pages[:layer], own, *self.pages[layer + 1 :])
        else:
            self.pages = self._scatter_part(self.pages, numbers_, part, self._put(layer), self._put(half))

    def checksums(self, blocks: jax.Array | np.ndarray) -> np.ndarray:
        """u32[n] of a piece or a part, equal wherever its bytes lie; waits for it. From any thread.

        On CPU the bytes are hashed where they are. Elsewhere each device sums its own shard: programs without
        collectives may be called beside the steps.
        """
        if self._on_cpu:
            import xxhash  # here alone: an accelerator's host needs none to serve by itself

            bytes_of = (np.ascontiguousarray(block).view(np.uint8).data for block in np.asarray(blocks))
            return np.array([xxhash.xxh3_64_intdigest(block) & 0xFFFFFFFF for block in bytes_of], np.uint32)
        if isinstance(blocks, np.ndarray):
            return layouts.host_checksums(blocks)
        axis, heads = blocks.ndim - 3, blocks.shape[-3]
        sums = []
        for shard in blocks.addressable_shards:
            if shard.replica_id == 0:
                first = jax.device_put(np.int32(shard.index[axis].start or 0), shard.device)
                sums.append(self._sums(shard.data, first, heads))
        return np.sum([np.asarray(part) for part in sums], axis=0, dtype=np.uint32)

    def warm_up(self) -> None:
        """Compile every program for every size; page 0's contents are nobody's."""
        for size in self.sizes:
            nobody = [0] * size
            piece, part = self.gather(nobody), self.gather_part(nobody, 0, 0)
            for array in (piece, part):
                self.checksums(array)  # as it comes out of a program, and as it comes from the host
                self.checksums(jax.device_put(np.asarray(array), array.sharding))
            self.scatter(nobody, piece)
            self.scatter_part(nobody, 0, 0, part)

    def to_device(self, blocks: np.ndarray) -> jax.Array:
        """A piece from the host; a copy, whatever happens to ``blocks`` later."""
        return jax.device_put(jnp.array(blocks), self.sharding)


class SpanningStore(PageStore):
    """Pages on a mesh of several processes. Every process makes the same calls, in the same order.

    Pieces leave and enter through the first device of this process: a gather copies its blocks to every device, and
    what is scattered is on every host. So whoever handles pieces (arena, transports, checksums) sees arrays of one
    device that is its own, and may do with them what it likes without the other processes.

    ``record(name, numbers, more, bytes)`` hears of every call before it is made; the leader tells it to the others.
    """

    def __init__(self, layout: PageLayout, num_blocks: int, mesh: Mesh):
        super().__init__(layout, num_blocks, mesh)
        self.record: Callable[[str, Sequence[int], tuple[int, ...], np.ndarray | None], None] = lambda *call: None
        self._everywhere = NamedSharding(mesh, P())
        self._make_gathers(self._everywhere, self._everywhere)
        self.piece_mesh = Mesh(np.array(mesh.local_devices[:1]), mesh.axis_names)
        self.sharding, self.part_sharding = piece_shardings(self.piece_mesh)

    def place(self, array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        """As a device_put, which would first ask all processes whether they have the same bytes: here they have."""
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    def argument(self, array: np.ndarray) -> jax.Array:
        return self.place(array, self._everywhere)

    def gather(self, numbers: Sequence[int]) -> jax.Array:
        self.record("gather", numbers, (), None)
        return super().gather(numbers).addressable_data(0)

    def scatter(self, numbers: Sequence[int], piece: jax.Array | np.ndarray) -> None:
        blocks = np.asarray(piece)
        self.record("scatter", numbers, (), blocks)
        super().scatter(numbers, blocks)

    def gather_part(self, numbers: Sequence[int], layer: int, half: int) -> jax.Array:
        self.record("gather_part", numbers, (layer, half), None)
        return super().gather_part(numbers, layer, half).addressable_data(0)

    def scatter_part(self, numbers: Sequence[int], layer: int, half: int, part: jax.Array | np.ndarray) -> None:
        blocks = np.asarray(part)
        self.record("scatter_part", numbers, (layer, half), blocks)
        super().scatter_part(numbers, layer, half, blocks)


def piece_shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """How a piece and a part lie on a mesh: sharded as the pages are."""
    return NamedSharding(mesh, P(*layouts.page_axes(True))), NamedSharding(mesh, P(None, "model", None, None))


def make_store(layout: PageLayout, num_blocks: int, mesh: Mesh) -> PageStore:
    """The store for this mesh. Of a mesh of several processes each must make its own."""
    return (SpanningStore if mesh.is_multi_process else PageStore)(layout, num_blocks, mesh)


def choose_moves(layout: PageLayout, mesh: Mesh) -> Choice:
    """Whose moves a store takes: the first of ``block_moves`` that does what XLA does, and why none before it."""
    refused: list[tuple[str, str]] = []
    for name in block_moves(mesh):
        if name in TRUSTED or (reason := _what_fails(name, layout, mesh)) is None:
            return Choice(name, tuple(refused))
        refused.append((name, reason))
    raise AssertionError("XLA moves blocks everywhere")


def _what_fails(name: str, layout: PageLayout, mesh: Mesh) -> str | None:
    """Of a few moves on the devices of the mesh, in a few words; None: nothing."""
    try:
        found, right = (_moved(PageStore(layout, 4, mesh, by)) for by in (name, "xla"))
    except Exception as error:  # on a device that nobody has tried a compiler may raise anything
        return str(error).partition("\n")[0] or type(error).__name__
    return None if found == right else f"it moves blocks wrongly (jax {jax.__version__})"


def _moved(store: PageStore) -> list[bytes]:
    """What comes out of a store of four blocks, and what is in it, after moves of every kind."""
    size, last = max(size for size in store.sizes if size <= 4), store.layout.num_layers - 1
    numbers = list(range(size, 0, -1))
    shape = size, *store.layout.page_shape
    piece = (np.arange(math.prod(shape)) % 251).astype(jnp.dtype(store.layout.dtype)).reshape(shape)
    store.scatter(numbers, piece)
    part = store.gather_part(numbers, last, 1)
    store.scatter_part(numbers[::-1], 0, 0, part)
    return [np.asarray(array).tobytes() for array in (part, store.gather(numbers), *jax.tree.leaves(store.pages))]
