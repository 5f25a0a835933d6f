"""Paged attention: one signature, several backends, and the page functions that know how a block is laid out.

Shape letters, used in every traced file:

    B sequences (rows)   T new tokens (packed)   P pages   C tokens per page   W table width   L layers
    D model   N query heads   K kv heads   G = N / K   H head   F ffn   V vocabulary

A step's new tokens are packed: row b owns tokens ``starts[b] : starts[b + 1]``, which are the last ones of its
``context[b]`` tokens. Rows of padding have no token and context 0. Pages (the storage of blocks) are one array

    pages: [P, L, 2, K, C, H]      one block = one contiguous page, all layers, keys then values

so a block moves in one piece, and one kv head's tokens are contiguous for the kernels; or, in the discrete layout,
one such array per layer (``pages.py``). Page 0 is nobody's: padding
tokens are written there.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jmemserve.kernels.pages import Pages
from jmemserve.kernels.rule import Rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Where a step's tokens live: the interface between host and traced code."""

    positions: jax.Array  # i32[T] place of each new token in its sequence
    slots: jax.Array  # i32[T] where its keys and values go: page * C + place in the page
    tables: jax.Array  # i32[B, W] pages of each row in token order
    context: jax.Array  # i32[B] tokens of each row after this step, 0 for padding
    starts: jax.Array  # i32[B + 1] first new token of each row


class Attention(Protocol):
    """Writes the keys and values of new tokens, and attends from each to everything before it in its own sequence."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: Pages,
        layer: int,
        ragged: Ragged,
        rule: Rule,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, Pages]:
        """q: [T, N, H], k and v: [T, K, H] of the new tokens; -> ([T, N, H], the pages with k and v in their slots).

        The pages are written in place when they are donated. ``sinks``: f32[N], one more score of every head whose
        value is nothing. Tokens of padding come back as finite garbage.
        """
        ...


BACKENDS = {
    "cpu": "jmemserve.kernels.cpu",
    "mosaic_ampere": "jmemserve.kernels.mosaic_ampere",
    "mosaic_gpu": "jmemserve.kernels.mosaic_gpu",
    "mosaic_mma": "jmemserve.kernels.mosaic_mma",
    "tpu": "jmemserve.kernels.tpu",
    "xla": "jmemserve.kernels.xla",
    "reference": "jmemserve.kernels.reference",
}


def attention_backend(name: str) -> Attention:
    """The paged attention of that name, for heads of any size (``stored_head``). Raises KeyError for an unknown one."""
    function: Attention = importlib.import_module(BACKENDS[name]).attend

    @functools.wraps(function)
    def attend(q, k, v, *rest, **more):
        head = q.shape[-1]
        if lacking := stored_head(name, head) - head:
            q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, lacking))) for x in (q, k, v))
        out, pages = function(q, k, v, *rest, **more)
        return out[..., :head], pages

    return attend


def stored_head(name: str, head_dim: int) -> int:
    """What a head takes in the pages, as the attention of that name wants it; what is more than the head is zeros."""
    stored: Callable[[int], int] | None = getattr(importlib.import_module(BACKENDS[name]), "stored_head", None)
    return head_dim if stored is None else stored(head_dim)


class Products(Protocol):
    """The product of a weight with columns, of which only the first ``used`` (i32[]) matter."""

    def __call__(self, weight: jax.Array, x: jax.Array, used: jax.Array) -> jax.Array:
        """[out, in] x [in, T] -> f32[out, T]; columns that are not used come back as finite garbage."""
        ...


def own_products(name: str) -> Products | None:
    """The products that come with the attention of that name; None: XLA's own are as good."""
    function: Products | None = getattr(importlib.import_module(BACKENDS[name]), "project", None)
    return function


def pair_tile(name: str) -> int:
    """Queries, and keys, that the attention of that name looks at in one go where a row has several new tokens."""
    return int(getattr(importlib.import_module(BACKENDS[name]), "TILE", 1))


def fold_of(name: str, head_dim: int) -> int:
    """Tokens of a block side by side in a row of the pages, as the attention of that name wants it (``pages.py``)."""
    fold: Callable[[int], int] | None = getattr(importlib.import_module(BACKENDS[name]), "fold", None)
    return 1 if fold is None else fold(stored_head(name, head_dim))


class Moves(Protocol):
    """Copies blocks out of pages and into them, as the functions of these names in ``pages.py``."""

    def gather_blocks(self, pages: Pages, indices: jax.Array, fold: int = 1) -> jax.Array: ...
    def scatter_blocks(self, pages: Pages, indices: jax.Array, blocks: jax.Array) -> Pages: ...
    def gather_part(self, pages: jax.Array, indices: jax.Array, *part: jax.Array, fold: int = 1) -> jax.Array: ...
    def scatter_part(self, pages: jax.Array, indices: jax.Array, blocks: jax.Array, *part: jax.Array) -> jax.Array: ...


def block_moves(mesh: Mesh) -> dict[str, Moves]:
    """What can move blocks of pages on a mesh with an axis "model", the fastest first; XLA, the last, can everywhere.

    On one CPU that is the C++ library, if it was built; on GPUs from Hopper on, of one process, a kernel.
    """
    from jmemserve.kernels import pages

    found: dict[str, Moves] = {}
    device = mesh.devices.flat[0]
    if device.platform == "cpu" and mesh.size == 1:
        from jmemserve.kernels.cpu import library, moves

        if library.is_there():
            found["cpu"] = moves
    elif device.platform == "gpu" and not mesh.is_multi_process:
        from jmemserve.kernels import mosaic_mma
        from jmemserve.kernels.mosaic_gpu import moves as by_tma
        from jmemserve.kernels.on_mesh import OnMesh

        if mosaic_mma.DEVICES.search(device.device_kind):
            found["mosaic_gpu"] = OnMesh(by_tma, mesh) if mesh.size > 1 else by_tma
    return found | {"xla": pages}
