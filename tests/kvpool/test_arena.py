"""Pages in device memory and blocks in host memory: what was written is read, and nothing compiles later."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jmemserve.engine.compiles import CompileCounter
from jmemserve.kernels import pages
from jmemserve.kernels.choice import Choice
from jmemserve.kernels.pages import PageLayout, block_checksums, host_checksums
from jmemserve.kvpool import store as store_module
from jmemserve.kvpool.arena import ALIGNMENT, NumpyArena, PinnedArena, aligned_empty, make_arena
from jmemserve.kvpool.store import PageStore

DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


def mesh_of(tp: int, first: int = 0) -> Mesh:
    return Mesh(np.array(jax.devices()[first : first + tp]), ("model",))


def layout_of(dtype: str = "float32", aggregated: bool = True, fold: int = 1) -> PageLayout:
    return PageLayout(3, 4, 8, 4, dtype, aggregated, fold)


def random_blocks(n: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(-100, 100, (n, *layout_of().page_shape))
    return raw.astype(jnp.dtype(dtype))


def same(one: object, other: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(one).view(np.uint8), other.view(np.uint8))


def make(kind: str, layout: PageLayout, mesh: Mesh) -> NumpyArena | PinnedArena:
    return NumpyArena(layout, 20) if kind == "numpy" else PinnedArena(layout, 20, mesh)


@pytest.mark.parametrize("kind", ["numpy", "pinned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_blocks_in_host_memory(kind: str, dtype: str, tp: int) -> None:
    layout, mesh = layout_of(dtype), mesh_of(tp)
    store, blocks = PageStore(layout, 20, mesh), random_blocks(5, dtype)
    arena = make(kind, layout, mesh)
    arena.write([3, 1, 7, 20], store.to_device(blocks[:4]))
    arena.write([5], blocks[4:])
    arrived = arena.read([20, 5, 3, 1], store.sharding)
    same(arrived, blocks[[3, 4, 0, 1]])
    assert arrived.sharding == store.sharding
    for slot, block in zip(arena.slots_of([7, 1]), blocks[[2, 1]], strict=True):
        same(slot, block)
    with arena.writable([1, 2]) as slots:
        slots[1][...] = blocks[0]
        slots[0][1, 0] = blocks[3][1, 0]  # a part: the rest stays
    mixed = blocks[1].copy()
    mixed[1, 0] = blocks[3][1, 0]
    same(arena.read([1, 2, 3, 7], store.sharding), np.stack([mixed, blocks[0], blocks[0], blocks[2]]))
    assert arena.nbytes == 20 * layout.bytes_per_block


@pytest.mark.parametrize("kind", ["numpy", "pinned"])
def test_what_was_read_does_not_change_with_the_slot(kind: str) -> None:
    layout, mesh = layout_of(), mesh_of(1)
    store, blocks = PageStore(layout, 20, mesh), random_blocks(2)
    arena = make(kind, layout, mesh)
    arena.write([1], blocks[:1])
    arrived = arena.read([1], store.sharding)
    arena.write([1], blocks[1:])
    same(arrived, blocks[:1])


def test_cpu_takes_plain_memory() -> None:
    assert isinstance(make_arena(layout_of(), 4, mesh_of(1)), NumpyArena)
    for dtype in DTYPES:
        assert aligned_empty((3, 5), dtype).ctypes.data % ALIGNMENT == 0


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("tp, fold", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_pages(aggregated: bool, tp: int, fold: int) -> None:
    layout = layout_of(aggregated=aggregated, fold=fold)
    store, blocks = PageStore(layout, 20, mesh_of(tp)), random_blocks(4)
    assert jax.tree.leaves(store.pages)[0].shape[-2:] == (8 // fold, 4 * fold)
    assert store.nbytes == 21 * layout.bytes_per_block
    store.scatter([4, 2, 9, 20], store.to_device(blocks))
    same(store.gather([20, 2, 4, 9]), blocks[[3, 1, 0, 2]])
    same(store.gather_part([2, 4, 9, 20], 2, 1), blocks[[1, 0, 2, 3], 2, 1])
    store.scatter_part([2, 4, 9, 20], 1, 0, store.gather_part([20, 9, 4, 2], 1, 0))
    expected = blocks.copy()
    expected[[1, 0, 2, 3], 1, 0] = blocks[[3, 2, 0, 1], 1, 0]
    same(store.gather([4, 2, 9, 20]), expected)
    same(store.gather([1]), np.zeros_like(blocks[:1]))  # nobody else's page


def raising(*args, **more):
    raise NotImplementedError("this device is too old\nand more words")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp, aggregated", [(1, True), (2, False)])
def test_moves_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch, tp: int, aggregated: bool, dtype: str) -> None:
    """What would be chosen raises on this device, or moves something wrong: the next one serves, and says why."""
    wrong = {
        "gather_blocks": lambda blocks, *more, **fold: pages.gather_blocks(blocks, *more, **fold)[::-1],
        "scatter_blocks": lambda blocks, *more: blocks,
        "gather_part": lambda blocks, *more, **fold: jnp.zeros_like(pages.gather_part(blocks, *more, **fold)),
        "scatter_part": raising,
    }
    ways = {name: SimpleNamespace(**(vars(pages) | {name: function})) for name, function in wrong.items()}
    monkeypatch.setattr(store_module, "block_moves", lambda mesh: ways | {"good": pages, "xla": pages})
    layout = layout_of(dtype, aggregated)
    chosen = PageStore(layout, 3, mesh_of(tp)).moved_by
    assert chosen.name == "good" and [name for name, _ in chosen.refused] == list(wrong)
    assert [reason.partition(" (")[0] for _, reason in chosen.refused] == [
        *["it moves blocks wrongly"] * 3,
        "this device is too old",
    ]
    monkeypatch.setattr(store_module, "block_moves", lambda mesh: {"cpu": ways["scatter_part"], "xla": pages})
    assert PageStore(layout, 3, mesh_of(tp)).moved_by == Choice("cpu"), "these need no trial"


@pytest.mark.parametrize("count", [0, 1, 3, 4, 63, 85, 200])
def test_cuts_cover_everything_once(count: int) -> None:
    store = PageStore(layout_of(), 2, mesh_of(1))
    cuts = store.cuts(count)
    assert [place for start, stop in cuts for place in range(start, stop)] == list(range(count))
    assert all(stop - start in store.sizes for start, stop in cuts)


def test_pieces_of_large_blocks_are_small() -> None:
    assert PageStore(PageLayout(8, 8, 64, 256, "float32"), 1, mesh_of(1)).sizes == (1, 4)


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "pinned"])
def test_nothing_compiles_after_warm_up(aggregated: bool, kind: str) -> None:
    layout, mesh = PageLayout(3, 2, 4, 8, "float32", aggregated), mesh_of(2, first=4)
    store, arena = PageStore(layout, 70, mesh), make(kind, layout, mesh)
    store.warm_up()
    arena.warm_up(store.sharding, store.sizes)
    counter = CompileCounter()
    try:
        for size in store.sizes[:3]:
            numbers = list(range(1, size + 1))
            piece = store.gather(numbers)
            store.checksums(piece)
            arena.write(numbers, piece)
            back = arena.read(numbers, store.sharding)
            store.checksums(back)
            store.scatter(numbers, back)
            store.scatter_part(numbers, 2, 1, store.gather_part(numbers, 0, 0))
        jax.block_until_ready(store.pages)
        assert counter.count == 0
    finally:
        counter.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_are_one_number_wherever_the_bytes_lie(dtype: str) -> None:
    blocks = random_blocks(4, dtype)
    host = host_checksums(blocks)
    whole = jax.jit(block_checksums, static_argnums=2)
    np.testing.assert_array_equal(host, whole(jnp.asarray(blocks), jnp.int32(0), 4))
    shards = [whole(jnp.asarray(blocks[:, :, :, k : k + 2]), jnp.int32(k), 4) for k in (0, 2)]
    np.testing.assert_array_equal(host, np.add(*map(np.asarray, shards)))
    raw = blocks.view(np.uint8).reshape(4, -1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        place, bit = int(rng.integers(raw.shape[1])), np.uint8(1 << int(rng.integers(8)))
        raw[2, place] ^= bit
        changed = host_checksums(blocks)
        assert changed[2] != host[2] and (np.delete(changed, 2) == np.delete(host, 2)).all()
        raw[2, place] ^= bit


@pytest.mark.parametrize("tp", [1, 2])
def test_a_stores_checksums_agree_for_arrays_of_all_kinds(tp: int) -> None:
    store, blocks = PageStore(layout_of(), 8, mesh_of(tp)), random_blocks(4)
    store.scatter([1, 2, 3, 4], store.to_device(blocks))
    expected = store.checksums(blocks)
    np.testing.assert_array_equal(store.checksums(store.gather([1, 2, 3, 4])), expected)
    np.testing.assert_array_equal(store.checksums(store.to_device(blocks)), expected)
    store._on_cpu = False  # as on an accelerator
    expected = store.checksums(blocks)
    np.testing.assert_array_equal(store.checksums(store.gather([1, 2, 3, 4])), expected)
