"""Filling a model: from safetensors, from Orbax, or from a seed, each array made where its shards live."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.config import LoadFormat
from jmemserve.errors import CheckpointError
from jmemserve.models.checkpoint import Checkpoint
from jmemserve.models.config import ModelConfig
from jmemserve.models.decoder import Decoder
from jmemserve.models.describe import Weight, describe

ORBAX_FOLDER = "orbax"  # inside a model folder

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)
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
        return init_dummy(config, dtype, mesh, seed, progress)
    if form is LoadFormat.ORBAX:
        return build(config, dtype, mesh, _orbax_reader(folder, config, dtype, mesh), progress)
    return load_safetensors(folder, config, dtype, mesh, progress)


def detect(folder: Path) -> LoadFormat:
    """Which kind of checkpoint a folder holds. Raises CheckpointError if none."""
    if any(folder.glob("*.safetensors")):
        return LoadFormat.SAFETENSORS
    if (folder / ORBAX_FOLDER).is_dir():
        return LoadFormat.ORBAX
    if any(folder.glob("*.safetensors.index.json")):
        return LoadFormat.SAFETENSORS
    raise CheckpointError(
        f"{folder} has neither *.safetensors nor an {ORBAX_FOLDER} folder; use --load-format dummy for random weights"
    )


def init_dummy(config: ModelConfig, dtype: str, mesh: Mesh, seed: int, progress: Progress) -> Model:
    """Small random weights that depend on the seed and the weight's path alone, not on the mesh."""

    def make(path: str, weight: Weight, sharding: NamedSharding) -> jax.Array:
        if weight.init is None:
            whole = np.ones(weight.shape, np.float32)
        else:
            whole = weight.init(np.random.default_rng((seed, zlib.crc32(path.encode()))), weight.shape)
        whole = whole.astype(jnp.dtype(dtype))
        return jax.make_array_from_callback(weight.shape, sharding, lambda index: whole[index])

    return build(config, dtype, mesh, make, progress)


def load_safetensors(folder: Path, config: ModelConfig, dtype: str, mesh: Mesh, progress: Progress) -> Model:
    """Weights from *.safetensors: only the slices that a shard needs are read, one weight at a time."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(describe(config), config.tied_embeddings)

    def make(path: str, weight: Weight, sharding: NamedSharding) -> jax.Array:
        wanted = jnp.dtype(dtype)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, path
            return checkpoint.read(weight, index, wanted)

        return jax.make_array_from_callback(weight.shape, sharding, shard)

    return build(config, dtype, mesh, make, progress)


def save_orbax(state: nnx.State, folder: Path) -> None:
    """Write the weights of a model into ``folder``/orbax, which must not exist."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX_FOLDER).absolute(), flat(state))
        checkpointer.wait_until_finished()


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
    """Make every array with ``make`` and put them into the module."""
    total, done = num_bytes(config, dtype), 0
    sizes = dict(mesh.shape)
    for weight in describe(config).values():
        weight.spec(sizes)  # refuse a mesh that does not fit before anything is read

    def param(path: str, weight: Weight) -> nnx.Param:
        nonlocal done
        array = make(path, weight, NamedSharding(mesh, P(*weight.spec(sizes))))
        done += _bytes(weight, dtype)
        progress(done, total)
        return nnx.Param(array)

    graph, state = nnx.split(Decoder(config, param))
    return graph, state


def _orbax_reader(
    folder: Path, config: ModelConfig, dtype: str, mesh: Mesh
) -> Callable[[str, Weight, NamedSharding], jax.Array]:
    """Restore everything at once (Orbax reads in parallel, straight into the shards), then hand out by path."""
    path = (folder / ORBAX_FOLDER).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{folder} has no {ORBAX_FOLDER} folder; make one with python -m jmemserve.convert")
    sizes = dict(mesh.shape)
    target = {
        name: jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, P(*weight.spec(sizes))))
        for name, weight in describe(config).items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            for name, weight in describe(config).items():
                found = tuple(saved[name].shape) if name in saved else None
                if found != weight.shape:
                    raise CheckpointError(
                        f"{path}: weight {name!r} has shape {found}, but config.json makes it {weight.shape}; "
                        "the two do not belong together"
                    )
            restored = checkpointer.restore(path, target)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they like for a broken checkpoint
        raise CheckpointError(f"{path} cannot be restored: {error}") from error
    return lambda name, weight, sharding: restored[name]


def _bytes(weight: Weight, dtype: str) -> int:
    return math.prod(weight.shape) * jnp.dtype(dtype).itemsize
