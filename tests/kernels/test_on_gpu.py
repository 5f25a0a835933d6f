"""On a real GPU: attention and moves of blocks as they are chosen there, tokens of an engine. By `make test-gpu`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Rows, Sizes, check, make_case
from engine_driver import Driver, tiny_model
from jax.sharding import Mesh

from jmemserve.config import AttentionBackend
from jmemserve.kernels import attention_backend, block_moves
from jmemserve.kernels.choice import PREFERRED, Choice, Need, why_not
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool.store import PageStore
from jmemserve.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

LLAMA, QWEN, WIDE = (2, 4, 128), (2, 7, 64), (8, 1, 128)  # K, G, H: those of models, some with fewer kv heads
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3}
COARSE = 1e-2  # of XLA's products, which a GPU rounds to 10 bits where they are asked for in float32
MIXED = [(300, 1), (1, 1), (140, 140), (2570, 300), (17, 2), (600, 1), (129, 129), (5000, 1)]


def backend(name: str, sizes: Sizes):
    """Its ``attend``, if it can serve this device."""
    kind = jax.devices()[0].device_kind
    need = Need("gpu", kind, sizes.dtype, sizes.kv_heads, sizes.group, sizes.head, sizes.block, sizes.layers)
    if (reason := why_not(name, need)) is not None:
        pytest.skip(reason)
    return attention_backend(name)


@pytest.mark.parametrize("name", PREFERRED["gpu"])
@pytest.mark.parametrize(
    "heads, block, dtype",
    [  # each block and type with heads of each kind that matters to it: all of them would take half an hour
        (LLAMA, 16, "bfloat16"),
        (LLAMA, 64, "float16"),
        (LLAMA, 256, "bfloat16"),
        (QWEN, 16, "float16"),
        (QWEN, 32, "bfloat16"),
        (QWEN, 128, "bfloat16"),
        (WIDE, 16, "bfloat16"),
        (WIDE, 128, "float16"),
    ],
)
def test_mixed_and_single(name: str, heads: tuple[int, int, int], block: int, dtype: str) -> None:
    sizes = Sizes(*heads, 2, block, dtype)
    attend, close = backend(name, sizes), max(TOLERANCE[dtype], COARSE if name == "xla" else 0)
    singles = [(context, 1) for context, _ in MIXED]
    for rows, rule, aggregated in (
        (MIXED, sizes.rule(150), True),
        (MIXED, sizes.rule(), False),
        (singles, sizes.rule(None, 20.0), True),
        (singles, sizes.rule(), False),
    ):
        used = sum(new for _, new in rows)
        padding = 3 if rows is singles else 41
        case = make_case(0, rows, sizes, used + padding, len(rows) + 3)
        check(attend, case, sizes, rule, None, aggregated, rtol=close, atol=close)


@pytest.mark.parametrize("name", PREFERRED["gpu"])
@pytest.mark.parametrize("heads", [(2, 1, 96), (1, 4, 160), (1, 2, 256)], ids=["96", "160", "256"])
def test_other_head_dims(name: str, heads: tuple[int, int, int]) -> None:
    sizes = Sizes(*heads, 2, 16, "bfloat16")
    attend = backend(name, sizes)
    for rows, rule in ((MIXED, sizes.rule(150)), ([(context, 1) for context, _ in MIXED], sizes.rule(None, 20.0))):
        check(attend, make_case(3, rows, sizes), sizes, rule, rtol=1.5e-2, atol=1.5e-2)


@pytest.mark.parametrize("name", PREFERRED["gpu"])
def test_sinks(name: str) -> None:
    sizes = Sizes(*LLAMA, 2, 64, "float16")
    sinks = np.random.default_rng(1).normal(size=8).astype(np.float32) * 3
    check(backend(name, sizes), make_case(1, MIXED, sizes), sizes, sizes.rule(), sinks, rtol=COARSE, atol=COARSE)


@pytest.mark.parametrize("name", PREFERRED["gpu"])
@pytest.mark.parametrize("seed", range(3))
def test_random_big_batches(name: str, seed: int) -> None:
    sizes = Sizes(*LLAMA, 2, 16, "bfloat16")
    rng = np.random.default_rng(seed)
    contexts = [32768, *(int(context) for context in rng.integers(1, 6000, size=30))]
    news = [1 if rng.random() < 0.6 else int(rng.integers(1, 100)) for _ in contexts]
    rows: Rows = [(context, min(new, context)) for context, new in zip(contexts, news, strict=True)]
    rng.shuffle(rows)
    rows = [(int(context), int(new)) for context, new in rows]
    case = make_case(seed, rows, sizes, sum(new for _, new in rows) + 17, 33)
    check(backend(name, sizes), case, sizes, sizes.rule(), rtol=1.5e-2, atol=1.5e-2)
    singles = make_case(seed, [(context, 1) for context, _ in rows], sizes)
    check(backend(name, sizes), singles, sizes, sizes.rule(1000), rtol=1.5e-2, atol=1.5e-2)


OURS = [name for name in PREFERRED["gpu"] if name != "xla"]


@pytest.mark.parametrize("name", OURS)
def test_pages_are_not_copied(name: str) -> None:
    """The compiled layer needs next to nothing beside its donated pages, which are large here."""
    sizes = Sizes(*LLAMA, 2, 16, "bfloat16")
    attend, case = backend(name, sizes), make_case(2, MIXED, sizes)
    pages = jnp.zeros((20000, *case.pages.shape[1:]), case.pages.dtype)

    def layers(q, k, v, pages, ragged):
        for layer in range(sizes.layers):
            q, pages = attend(q, k, v, pages, layer, ragged, sizes.rule())
        return q, pages

    step = jax.jit(layers, donate_argnums=3).lower(case.q, case.k, case.v, pages, case.ragged).compile()
    assert step.memory_analysis().temp_size_in_bytes < pages.nbytes / 4


@pytest.mark.parametrize("name", OURS)
def test_engine_gives_the_tokens_of_xla(name: str, tmp_path: Path) -> None:
    """In bfloat16 two rightful kernels may part at a near tie, never at a clear choice."""
    backend(name, Sizes(2, 3, 64, 2, 16, "bfloat16"))
    folder = tiny_model(tmp_path, hidden_size=384, head_dim=64, torch_dtype="bfloat16")
    rng = np.random.default_rng(0)
    prompts = [tuple(int(token) for token in rng.integers(0, 97, size=size)) for size in (3, 20, 40, 64)]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2, ignore_eos=True)
    found = []
    for attention in (AttentionBackend.XLA, AttentionBackend(name)):
        with Driver(folder, "colocated", dtype="bfloat16", block_size=16, attention=attention) as driver:
            outputs = [driver.submit(f"r{number}", prompt, params) for number, prompt in enumerate(prompts)]
            driver.finish(*outputs)
            found.append(outputs)
    for xla, ours in zip(*found, strict=True):
        for place, (wanted, got) in enumerate(zip(xla.tokens, ours.tokens, strict=True)):
            if wanted != got:
                best, second = sorted((score for _, score in xla.logprobs[place].top), reverse=True)[:2]
                assert best - second < 0.05, f"tokens part at {place} by {best - second}"
                break


# -- moves of blocks ---------------------------------------------------------------------------------------------------


def mesh_with_kernel(size: int | None = 1) -> Mesh:
    """Of so many GPUs, or all of them."""
    mesh = Mesh(jax.devices()[:size], ("model",))
    if "mosaic_gpu" not in block_moves(mesh):
        pytest.skip("blocks are moved by XLA here")
    return mesh


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("heads", [(8, 16, 128), (2, 64, 64), (1, 16, 16), (4, 128, 80), (8, 64, 256)])
def test_blocks_are_moved_as_by_xla(heads: tuple[int, int, int], aggregated: bool, dtype: str) -> None:
    mesh, layout = mesh_with_kernel(), PageLayout(5, *heads, dtype, aggregated)
    assert PageStore(layout, 4, mesh).moved_by == Choice("mosaic_gpu")
    stores, rng = [PageStore(layout, 80, mesh, by) for by in ("mosaic_gpu", "xla")], np.random.default_rng(0)
    for turn in range(3):
        for size in stores[0].sizes:
            piece = rng.integers(-99, 100, (size, *layout.page_shape)).astype(jnp.dtype(dtype))
            into, out = (1 + rng.permutation(80)[:size] for _ in range(2))
            found = []
            for store in stores:
                store.scatter(into, piece)
                blocks, part = store.gather(out), store.gather_part(into, 1 + turn, 1)
                store.scatter_part(out, turn, 0, part)
                found.append([np.asarray(array).tobytes() for array in (blocks, part)])
            assert found[0] == found[1]
    ours, xla = ([np.asarray(array).tobytes() for array in jax.tree.leaves(store.pages)] for store in stores)
    assert ours == xla


def test_each_gpu_moves_its_own_heads() -> None:
    mesh = mesh_with_kernel(None)
    assert PageStore(PageLayout(4, 2 * mesh.size, 16, 128, "bfloat16"), 4, mesh).moved_by == Choice("mosaic_gpu")


@pytest.mark.parametrize("aggregated", [True, False])
def test_pages_are_written_where_they_are(aggregated: bool) -> None:
    mesh, layout = mesh_with_kernel(), PageLayout(4, 8, 16, 128, "bfloat16", aggregated)
    held, numbers = layout.zeros(4000), jnp.arange(1, 17)
    blocks = jnp.ones((16, *layout.page_shape), layout.dtype)
    scatter = jax.jit(block_moves(mesh)["mosaic_gpu"].scatter_blocks, donate_argnums=0)
    move = scatter.lower(held, numbers, blocks).compile()
    where = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(held)]
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(move(held, numbers, blocks))] == where
    assert move.memory_analysis().temp_size_in_bytes < 1 << 20
