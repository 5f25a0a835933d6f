"""Moves of blocks on a mesh of several devices: each moves the kv heads that it has, without hearing from another."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmemserve.kernels import Moves
from jmemserve.kernels.pages import Pages


class OnMesh:
    """The moves of one device, which XLA cannot divide, on a mesh with an axis "model"; see ``pages.page_axes``."""

    def __init__(self, moves: Moves, mesh: Mesh):
        self._moves, self._mesh = moves, mesh

    def gather_blocks(self, pages: Pages, indices: jax.Array, fold: int = 1) -> jax.Array:
        return self._run(partial(self._moves.gather_blocks, fold=fold), _heads(6), pages, indices)

    def scatter_blocks(self, pages: Pages, indices: jax.Array, blocks: jax.Array) -> Pages:
        return self._run(self._moves.scatter_blocks, _specs(pages), pages, indices, blocks)

    def gather_part(self, pages: jax.Array, indices: jax.Array, *part: jax.Array, fold: int = 1) -> jax.Array:
        return self._run(partial(self._moves.gather_part, fold=fold), _heads(4), pages, indices, *part)

    def scatter_part(self, pages: jax.Array, indices: jax.Array, blocks: jax.Array, *part: jax.Array) -> jax.Array:
        return self._run(self._moves.scatter_part, _specs(pages), pages, indices, blocks, *part)

    def _run(self, function: Callable, out, *arrays):
        """On every device with its own heads; ``out``: how the result is divided."""
        specs = _specs(arrays)
        return jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def _heads(axes: int) -> P:
    """How an array [..., K, C, H] is divided; one with fewer axes is of indices, which every device has."""
    return P(*(None,) * (axes - 3), "model") if axes > 3 else P()


def _specs(arrays):
    return jax.tree.map(lambda array: _heads(array.ndim), arrays)
