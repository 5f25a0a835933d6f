"""Filling a model: from safetensors, from Orbax, or from a seed, each array made where its shards live."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.config import LoadFormat
from jmemserve.errors import CheckpointError
from jmemserve.models.checkpoint import Checkpoint, has_safetensors, no_safetensors
from jmemserve.models.config import ModelConfig
from jmemserve.models.decoder import Decoder
from jmemserve.models.describe import Weight, describe
from jmemserve.models.orbax_io import has_orbax, restore_orbax
from jmemserve.models.quantized import quantize

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)
REPEATS = 1_048_573  # numbers after which dummies begin again: a prime, so that hardly two rows are equal
Model = tuple[nnx.GraphDef, nnx.State]


def num_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights together."""
    return sum(_bytes(weight, dtype) for weight in describe(config).values())


def load(
    folder: Path, form: LoadFormat, config: ModelConfig, dtype: str, mesh: Mesh, seed: int, progress: Progress
) -> Model:
    """The model on ``mesh`` (axis "model"), as nnx.split returns it.

    Raises CheckpointError when the files are broken or disagree with the config, ConfigError when the mesh does not
    divide the model.
    """
    if form is LoadFormat.AUTO:
        form = detect(folder)
    if form is LoadFormat.DUMMY:
        return init_dummy(_unrounded(config), dtype, mesh, seed, progress)
    if form is LoadFormat.ORBAX:
        return load_orbax(folder, config, dtype, mesh, progress)
    return load_safetensors(folder, config, dtype, mesh, progress)


def detect(folder: Path) -> LoadFormat:
    """Which kind of checkpoint a folder holds. Raises CheckpointError if none."""
    if has_safetensors(folder):
        return LoadFormat.SAFETENSORS
    if has_orbax(folder):
        return LoadFormat.ORBAX
    raise CheckpointError(
        f"{no_safetensors(folder)}, nor an orbax folder; --load-format dummy would serve random weights"
    )


def _unrounded(config: ModelConfig) -> ModelConfig:
    """The same model for weights that do not come from its checkpoint: they are floats, and rounded if its are."""
    if config.quantized is None:
        return config
    return dataclasses.replace(config, quantized=dataclasses.replace(config.quantized, stored=False))


def init_dummy(config: ModelConfig, dtype: str, mesh: Mesh, seed: int, progress: Progress) -> Model:
    """Small random weights that depend on the seed and the weight's path alone, not on the mesh.

    They are parts of one row of numbers that repeats itself: to draw or even to copy all would take a minute per 16 GB.
    """
    longest = max(math.prod(weight.shape) for weight in describe(config).values())
    rows: dict[tuple, np.ndarray] = {}
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def row(init: Callable, kind: np.dtype) -> np.ndarray:
        if (init, kind) not in rows:
            some = init(np.random.default_rng(seed), (REPEATS,)).astype(kind)
            rows[init, kind] = np.resize(some, longest + REPEATS)
        return rows[init, kind]

    def make(path: str, weight: Weight, sharding: NamedSharding) -> jax.Array:
        kind = jnp.dtype(weight.dtype or dtype)
        if weight.init is None:
            whole = np.ones(weight.shape, kind)
        else:
            first = zlib.crc32(path.encode()) % REPEATS
            whole = row(weight.init, kind)[first : first + math.prod(weight.shape)].reshape(weight.shape)
        if on_cpu:  # where an array may be left where the numbers are, weights would share memory and caches
            whole = whole.copy()
        return jax.make_array_from_callback(weight.shape, sharding, lambda index: whole[index])

    return build(config, dtype, mesh, make, progress)


def load_safetensors(folder: Path, config: ModelConfig, dtype: str, mesh: Mesh, progress: Progress) -> Model:
    """Weights from *.safetensors: only the slices that a shard needs are read, one weight at a time."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(describe(config.stored), config.tied_embeddings, config.tensor_prefix)

    def make(path: str, weight: Weight, sharding: NamedSharding) -> jax.Array:
        wanted = jnp.dtype(weight.dtype or dtype)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, path
            read = checkpoint.read_scales if path.endswith("_scale") else checkpoint.read
            return read(weight, index, wanted)

        return jax.make_array_from_callback(weight.shape, sharding, shard)

    return build(config, dtype, mesh, make, progress)


def load_orbax(folder: Path, config: ModelConfig, dtype: str, mesh: Mesh, progress: Progress) -> Model:
    """Weights from ``folder``/orbax, as jmemserve.convert writes it."""
    weights, sizes = describe(config.stored), dict(mesh.shape)

    def like(weight: Weight) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*weight.spec(sizes)))
        return jax.ShapeDtypeStruct(weight.shape, jnp.dtype(weight.dtype or dtype), sharding=sharding)

    target = {name: like(weight) for name, weight in weights.items()}
    restored = restore_orbax(folder, weights, target)
    return build(config, dtype, mesh, lambda path, weight, sharding: restored.pop(path), progress)


def flat(state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of a model by path, as in ``describe``."""
    pairs = nnx.to_flat_state(state)
    return {".".join(str(part) for part in path): variable[...] for path, variable in pairs}


def build(
    config: ModelConfig,
    dtype: str,
    mesh: Mesh,
    make: Callable[[str, Weight, NamedSharding], jax.Array],
    progress: Progress,
) -> Model:
    """Make every array with ``make``, as the checkpoint has it; round it if need be; and put it into the module."""
    stored, ours = describe(config.stored), describe(config)
    total, done = num_bytes(config.stored, dtype), 0
    sizes = dict(mesh.shape)
    # Made first, so that a mesh that does not fit is refused before anything is read.
    shardings = {path: NamedSharding(mesh, P(*weight.spec(sizes))) for path, weight in ours.items()}
    scales: dict[str, jax.Array] = {}  # of the weight that was rounded last

    def param(path: str, weight: Weight) -> nnx.Param:
        nonlocal done
        if path in scales:
            return nnx.Param(scales.pop(path))
        array = make(path, stored[path], shardings[path])
        if array.dtype == jnp.float16 and not jnp.isfinite(array).all():
            raise CheckpointError(f"some of {path!r} is above float16's largest, 65,504, or no number; use bfloat16")
        if weight.dtype != stored[path].dtype:
            assert weight.dtype is not None, path
            scale = f"{path}_scale"
            array, scales[scale] = quantize(array, weight.inputs, weight.dtype, (shardings[path], shardings[scale]))
        done += _bytes(stored[path], dtype)
        progress(done, total)
        return nnx.Param(array)

    graph, state = nnx.split(Decoder(config, param))
    return graph, state


def _bytes(weight: Weight, dtype: str) -> int:
    return math.prod(weight.shape) * jnp.dtype(weight.dtype or dtype).itemsize
