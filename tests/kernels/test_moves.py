"""Moves of blocks on GPUs without one: what the kernel copies, in JAX's interpreter, and that it can be lowered.

The interpreter raises where two thread blocks race for memory. Lowering goes as far as PTX instructions.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.kernels import block_moves, pages
from jmemserve.kernels.mosaic_gpu import moves
from jmemserve.kernels.on_mesh import OnMesh
from jmemserve.kernels.pages import PageLayout

WAYS = ("gather_blocks", "scatter_blocks", "gather_part", "scatter_part")


def arguments(way: str, layout: PageLayout, num_pages: int, count: int, make: Callable):
    """Of one of the functions; ``make(shape, dtype)`` gives its arrays of numbers, ``count`` blocks are moved."""
    own = num_pages, *layout.page_shape[1:]
    held = make((num_pages, *layout.page_shape), layout.dtype)
    if not layout.aggregated:
        held = tuple(make(own, layout.dtype) for _ in range(layout.num_layers))
    numbers = make((count,), "int32")
    if way.endswith("blocks"):
        return held, numbers, *((make((count, *layout.page_shape), layout.dtype),) if way == "scatter_blocks" else ())
    part = (make((count, *layout.page_shape[2:]), layout.dtype),) if way == "scatter_part" else ()
    place = tuple(make((), "int32") for _ in range(2 if layout.aggregated else 1))
    return held if layout.aggregated else held[1], numbers, *part, *place


def numbers_of(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Random ones; indices are [5, 1, 4], a layer and a half are 1."""
    if dtype == "int32":
        return jnp.array([5, 1, 4], jnp.int32) if shape else jnp.int32(1)
    bits = np.random.default_rng(len(shape)).integers(-99, 100, shape)
    return jnp.asarray(bits, dtype)


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "sizes, dtype",
    [
        ((3, 2, 16, 64), "bfloat16"),
        ((2, 1, 8, 16), "float32"),
        ((2, 3, 4, 72), "float16"),
        ((2, 1, 64, 1024), "float32"),
    ],
    ids=["rows of 256", "one row", "rows of 32", "several copies"],
)
def test_the_kernel_moves_what_xla_moves(
    way: str, sizes: tuple[int, int, int, int], dtype: str, aggregated: bool
) -> None:
    given = arguments(way, PageLayout(*sizes, dtype, aggregated), 6, 3, numbers_of)
    ours = partial(getattr(moves, way), interpret=plgpu.InterpretGPUParams(detect_races=True))
    found, right = (jax.tree.leaves(jax.jit(move)(*given)) for move in (ours, getattr(pages, way)))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_rows_that_cannot_be_copied_are_refused() -> None:
    given = arguments("gather_blocks", PageLayout(1, 1, 1, 4, "bfloat16"), 6, 3, numbers_of)
    with pytest.raises(ValueError, match="16 bytes"):
        jax.jit(moves.gather_blocks)(*given)


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_each_device_of_a_mesh_moves_its_own_heads(way: str, aggregated: bool) -> None:
    mesh = Mesh(jax.devices()[:2], ("model",))

    def placed(shape: tuple[int, ...], dtype: str) -> jax.Array:
        heads = P(*(None,) * (len(shape) - 3), "model") if len(shape) > 3 else P()
        return jax.device_put(numbers_of(shape, dtype), NamedSharding(mesh, heads))

    given = arguments(way, PageLayout(3, 4, 2, 8, "float32", aggregated), 6, 3, placed)
    found = jax.jit(getattr(OnMesh(pages, mesh), way))(*given)
    right = jax.jit(getattr(pages, way))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        assert one.sharding.spec[one.ndim - 3] == "model"


# -- lowering ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device(jax.sharding.AbstractDevice):
    """One that is not here."""

    compute_capability: str = "9.0"


H100 = Device(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
B200 = Device(device_kind="NVIDIA B200", num_cores=148, platform="gpu", compute_capability="10.0")


def lowered(way: str, layout: PageLayout, device: Device) -> str:
    given = arguments(way, layout, 20_000, 16, jax.ShapeDtypeStruct)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        donated = 0 if way.startswith("scatter") else ()
        traced = jax.jit(getattr(moves, way), donate_argnums=donated).trace(*given)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("device", [H100, B200], ids=["H100", "B200"])
@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers(way: str, aggregated: bool, dtype: str, device: Device) -> None:
    text = lowered(way, PageLayout(32, 8, 16, 128, dtype, aggregated), device)
    assert text.count("custom_call @mosaic_gpu") == 1, "one launch for all layers"
    assert "cp.async.bulk" in text
    if way.startswith("scatter"):
        count = 32 if way == "scatter_blocks" and not aggregated else 1
        assert text.count("tf.aliasing_output") == count, "the pages are written in place"


@pytest.mark.parametrize("heads", [(1, 16), (4, 80), (32, 96), (2, 192), (8, 256)])
@pytest.mark.parametrize("size", [16, 256])
def test_other_sizes_lower(heads: tuple[int, int], size: int) -> None:
    kv_heads, head_dim = heads
    for way in WAYS:
        lowered(way, PageLayout(2, kv_heads, size, head_dim, "float16"), H100)


def test_it_lowers_on_a_mesh() -> None:
    axes = (2,), ("model",)
    mesh = AbstractMesh(*axes, axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H100)
    layout = PageLayout(32, 8, 16, 128, "bfloat16")
    given = arguments("scatter_blocks", layout, 20_000, 16, jax.ShapeDtypeStruct)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(OnMesh(moves, mesh).scatter_blocks, donate_argnums=0).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


# -- choice ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fake:
    """Of a mesh, or of a device of it, what the choice looks at."""

    device_kind: str
    size: int = 1
    is_multi_process: bool = False
    platform: str = "gpu"

    @property
    def devices(self) -> np.ndarray:
        return np.array([self] * self.size, object)


@pytest.mark.parametrize(
    "mesh, names",
    [
        (Fake("NVIDIA H200"), ["mosaic_gpu", "xla"]),
        (Fake("NVIDIA B200", 8), ["mosaic_gpu", "xla"]),
        (Fake("NVIDIA B200", 8, is_multi_process=True), ["xla"]),
        (Fake("NVIDIA A100-SXM4-80GB"), ["xla"]),
        (Fake("TPU v5 lite", platform="tpu"), ["xla"]),
    ],
)
def test_gpus_from_hopper_on_have_the_kernel(mesh: Fake, names: list[str]) -> None:
    assert list(block_moves(mesh)) == names  # type: ignore[arg-type]
