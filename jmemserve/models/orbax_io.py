"""Weights in an Orbax checkpoint: the sub-folder ``orbax`` of a model folder, one array per path of ``describe``."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jmemserve.errors import CheckpointError, ConfigError
from jmemserve.models.describe import Weight

ORBAX_FOLDER = "orbax"  # inside a model folder
_NEEDED = ("_METADATA", "manifest.ocdbt")  # looked for first: Orbax prints a page of tracebacks where one is missing
_AGAIN = "make it again with python -m jmemserve.convert"


def has_orbax(folder: Path) -> bool:
    """Whether a model folder has weights in Orbax form."""
    return (folder / ORBAX_FOLDER).is_dir()


def save_orbax(arrays: dict[str, jax.Array], folder: Path) -> None:
    """Write arrays by path into ``folder``/orbax. Raises ConfigError if that is there already."""
    path = (folder / ORBAX_FOLDER).absolute()
    if path.exists():
        raise ConfigError(f"{path} is there already, and is never overwritten; remove it, or choose another folder")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)
        checkpointer.wait_until_finished()


def saved_dtypes(folder: Path) -> set[str]:
    """Names of the types that the saved arrays have. Raises CheckpointError when that cannot be read."""
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = jax.tree.leaves(_saved(checkpointer, folder), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {str(leaf.dtype) for leaf in leaves if hasattr(leaf, "dtype")}


def restore_orbax(
    folder: Path, weights: dict[str, Weight], target: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays by path, each in the shape, type and sharding of ``target``.

    Everything is restored at once: Orbax reads in parallel, straight into the shards. Raises CheckpointError when the
    files are broken or do not hold exactly ``weights``.
    """
    path = folder / ORBAX_FOLDER
    if not has_orbax(folder):
        raise CheckpointError(f"{folder} has no {ORBAX_FOLDER} folder; {_AGAIN}")
    with ocp.StandardCheckpointer() as checkpointer:
        saved = _saved(checkpointer, folder)
        for name in sorted(weights.keys() | saved.keys()):
            found = tuple(getattr(saved.get(name), "shape", None) or ()) or None
            wanted = weights[name].shape if name in weights else None
            if found != wanted:
                raise CheckpointError(
                    f"{path}: weight {name!r} is {_words(found)} in the checkpoint and {_words(wanted)} by "
                    "config.json; the two do not belong together"
                )
        try:
            return checkpointer.restore(path.absolute(), target)
        except Exception as error:  # Orbax and TensorStore raise whatever they like for a broken checkpoint
            reason = str(error).partition(". See full")[0].partition("\n")[0]
            raise CheckpointError(f"{path} cannot be restored ({reason}); {_AGAIN}") from error


def _saved(checkpointer: ocp.StandardCheckpointer, folder: Path) -> dict[str, Any]:
    """What Orbax says of the arrays of a checkpoint, by path."""
    path = folder / ORBAX_FOLDER
    if lost := [name for name in _NEEDED if not (path / name).is_file()]:
        raise CheckpointError(f"{path} is not a whole Orbax checkpoint: it lacks {lost[0]}; {_AGAIN}")
    try:
        found = checkpointer.metadata(path.absolute()).item_metadata
    except Exception as error:  # as above
        raise CheckpointError(f"{path} is not a whole Orbax checkpoint ({error}); {_AGAIN}") from error
    tree = getattr(found, "tree", None)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is not a whole Orbax checkpoint: its metadata cannot be read; {_AGAIN}")
    return tree


def _words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
