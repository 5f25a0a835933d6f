"""Writing a Hugging Face checkpoint: fused weights taken apart again into the tensors they came from."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jmemserve.models.checkpoint import INDEX, SINGLE
from jmemserve.models.describe import Source, Weight

MAX_FILE_BYTES = 5_000_000_000  # a model beyond that is written in several files with an index


def save_safetensors(
    folder: Path,
    weights: dict[str, Weight],
    arrays: dict[str, jax.Array],
    progress: Callable[[int], object],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write arrays by path of ``weights`` into ``folder``; ``progress`` hears how many bytes each file took."""
    files = _files(weights, arrays, max_file_bytes)
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    homes: dict[str, str] = {}
    for name, parts in zip(names, files, strict=True):
        tensors: dict[str, np.ndarray] = {}
        for path, source in parts:
            _put(tensors, source, arrays[path])
        save_file(tensors, folder / name, metadata={"format": "pt"})  # transformers wants to be told so
        homes |= dict.fromkeys(tensors, name)
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    if len(files) > 1:
        total = sum(array.nbytes for array in arrays.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _files(
    weights: dict[str, Weight], arrays: dict[str, jax.Array], max_file_bytes: int
) -> list[list[tuple[str, Source]]]:
    """(path of the weight, tensor) for each file, in the order of the model, no file above the limit if it can be."""
    files: list[list[tuple[str, Source]]] = [[]]
    room = max_file_bytes
    for path, weight in weights.items():
        for source in weight.sources:
            size = int(np.prod(source.shape)) * arrays[path].dtype.itemsize
            if size > room and files[-1] and files[-1][-1][1].name != source.name:
                files.append([])
                room = max_file_bytes
            files[-1].append((path, source))
            room -= size
    return files


def _put(tensors: dict[str, np.ndarray], source: Source, array: jax.Array) -> None:
    """The part of a weight that came from ``source``, into the tensor it came from."""
    part = np.ascontiguousarray(np.asarray(array)[source.part].reshape(source.shape))
    if source.all_rows is None:
        tensors[source.name] = part
        return
    whole = tensors.setdefault(source.name, np.empty(source.tensor_shape, part.dtype))
    whole[source.first_row : source.first_row + len(part)] = part
