"""The arrays behind the addresses: one pool of pages on one mesh, donated to every step.

The store has the only name of the pages array. Reads that must see old contents are enqueued before the step that
donates the pages; dispatch order is enough, so every call comes from the instance's own thread.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.kernels.pages import KV_HEAD_AXIS, PageLayout, gather_blocks, scatter_blocks

PIECES = (1, 4, 16, 64)  # blocks per gather or scatter: few sizes, compiled once; the rest is padded with page 0


class PageStore:
    """``num_blocks`` usable pages (numbers 1 to num_blocks; page 0 takes the writes of padding)."""

    def __init__(self, layout: PageLayout, num_blocks: int, mesh: Mesh):
        self.layout = layout
        self.num_blocks = num_blocks
        axes: list[str | None] = [None] * 6
        axes[KV_HEAD_AXIS] = "model"
        self.sharding = NamedSharding(mesh, P(*axes))
        shape = (num_blocks + 1, *layout.page_shape)
        self.pages: jax.Array = jax.jit(lambda: jnp.zeros(shape, layout.dtype), out_shardings=self.sharding)()
        self._replicated = NamedSharding(mesh, P(None))
        self._gather = jax.jit(gather_blocks, out_shardings=self.sharding)
        self._scatter = jax.jit(scatter_blocks, donate_argnums=0, out_shardings=self.sharding)

    def gather(self, indices: Sequence[int]) -> Iterator[tuple[int, jax.Array]]:
        """Copies of blocks in pieces: (first position, [n, L, 2, K, C, H]), n of PIECES, padded with page 0."""
        for start, piece in _pieces(indices):
            yield start, self._gather(self.pages, jax.device_put(piece, self._replicated))

    def scatter(self, indices: Sequence[int], blocks: jax.Array) -> None:
        """Write a piece that ``gather`` of any store with an equal layout made, whatever mesh it lies on.

        ``indices`` are the real blocks; the padding goes to page 0.
        """
        assert blocks.shape[1:] == self.layout.page_shape, (blocks.shape, self.layout)
        padded = np.zeros(blocks.shape[0], np.int32)
        padded[: len(indices)] = indices
        arrived = jax.device_put(blocks, self.sharding)
        self.pages = self._scatter(self.pages, jax.device_put(padded, self._replicated), arrived)

    def warm_up(self) -> None:
        """Compile every gather and scatter; page 0's contents are nobody's."""
        for size in PIECES:
            for _, blocks in self.gather([0] * size):
                self.scatter([0] * size, blocks)

    def warm_up_to(self, other: "PageStore") -> None:
        """Compile what moving blocks from here to ``other`` needs."""
        for size in PIECES:
            for _, blocks in self.gather([0] * size):
                other.scatter([0] * size, blocks)


def _pieces(indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Cut into the fewest padded pieces: (first position, i32[n]) with n of PIECES."""
    start = 0
    while start < len(indices):
        rest = len(indices) - start
        size = next((size for size in PIECES if size >= rest), PIECES[-1])
        piece = np.zeros(size, np.int32)
        real = indices[start : start + size]
        piece[: len(real)] = real
        yield start, piece
        start += size
