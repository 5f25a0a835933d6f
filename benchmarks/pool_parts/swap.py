"""Blocks from HBM to DRAM of one instance and back, in the two kinds of arena."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh
from pool_parts.rows import Part, Row, median

from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import BlockPool, Medium
from jmemserve.kvpool.arena import HostArena, NumpyArena, PinnedArena
from jmemserve.kvpool.node import PoolNode
from jmemserve.kvpool.store import PageStore

COUNTS = (1, 4, 16, 64, 256)


class Owner:
    """A node whose owner is this thread: it does nothing but wait for one future after another."""

    def __init__(self, layout: PageLayout, num_blocks: int, arena: HostArena, mesh: Mesh):
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        blocks = BlockPool("a", 1, num_blocks, layout.block_size, num_blocks)
        store = PageStore(layout, num_blocks, mesh)
        self.node = PoolNode(
            blocks, store, arena, (), self._inbox.put, lambda peer, message: None, lambda arrived: None
        )

    def wait[T](self, future: Future[T]) -> T:
        while not future.done():
            self._inbox.get(timeout=60)()
        return future.result()


def measure(repeats: int, quick: bool, layout: PageLayout) -> Part:
    """GB/s of swap_out and swap_in, each until the bytes are in place, with the checksums that are always taken."""
    counts = COUNTS[:3] if quick else COUNTS
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    kinds: dict[str, Callable[[], HostArena]] = {"numpy": lambda: NumpyArena(layout, max(counts))}
    remarks = []
    if "pinned_host" in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        kinds["pinned"] = lambda: PinnedArena(layout, max(counts), mesh)
    else:
        remarks.append("this device has no pinned_host memory: PinnedArena not measured")
    rows: list[Row] = []
    for kind, make in kinds.items():
        owner = Owner(layout, max(counts), make(), mesh)
        rows += [_row(owner, kind, count, repeats) for count in counts]
        owner.node.close()
    return Part({"GB/s by blocks": rows}, remarks=remarks)


def _row(owner: Owner, kind: str, count: int, repeats: int) -> Row:
    node, size = owner.node, owner.node.store.layout.block_size
    nbytes = count * node.store.layout.bytes_per_block
    tokens = list(range(count * size + 1))
    data = np.ones((1, *node.store.layout.page_shape), node.store.layout.dtype)
    outs, ins = [], []
    for _ in range(repeats + 1):  # the first does not count
        blocks = node.alloc_mem(count).result(60)
        for start, stop in node.store.cuts(count):
            node.write(blocks[start:stop], np.repeat(data, stop - start, 0))
        node.blocks.insert(tokens, blocks)
        node.free_mem(blocks)
        jax.block_until_ready(node.store.pages)
        start_s = time.perf_counter()
        moved = owner.wait(node.swap_out(count))
        outs.append(time.perf_counter() - start_s)
        found = node.blocks.match(tokens)
        held = found.take()
        assert moved == count == sum(a.medium is Medium.DRAM for a in held), (moved, count, len(held))
        start_s = time.perf_counter()
        fresh = owner.wait(node.swap_in(held))
        jax.block_until_ready(node.store.pages)
        ins.append(time.perf_counter() - start_s)
        node.free_mem(fresh)
        node.blocks.clear()
    return {
        "arena": kind,
        "blocks": count,
        "mib": nbytes / 2**20,
        "out_gb_s": nbytes / median(outs[1:]) / 1e9,
        "in_gb_s": nbytes / median(ins[1:]) / 1e9,
        "out_ms": 1e3 * median(outs[1:]),
        "in_ms": 1e3 * median(ins[1:]),
    }
