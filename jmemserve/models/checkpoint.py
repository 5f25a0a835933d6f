"""Reading a Hugging Face checkpoint in safetensors, slice by slice, straight into the shards that need it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jmemserve.errors import CheckpointError, ConfigError
from jmemserve.models.describe import Source, Weight
from jmemserve.models.fields import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NARROW = {"I8": "int8", "F8_E4M3": "float8_e4m3fn"}
_TYPES = _FLOATS | _NARROW
if not hasattr(np, "float8_e4m3fn"):  # safetensors looks for the type there, as it does for those that numpy has
    np.float8_e4m3fn = ml_dtypes.float8_e4m3fn  # type: ignore[attr-defined]
# Tensors that some checkpoints carry and that are derived from config.json.
_DERIVED = ("rotary_emb.inv_freq", "attention.masked_bias", "attn.bias")


class Checkpoint:
    """The tensors of a folder, by name. Raises CheckpointError for whatever is wrong with its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._homes: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path, names in _files(folder):
            try:
                handle = safe_open(path, "np")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
            self._open[path] = handle
            present = set(handle.keys())
            if missing := sorted((names or present) - present):
                raise CheckpointError(f"{path} lacks the tensor {missing[0]!r} that {INDEX} says it holds")
            if twice := sorted(self._homes.keys() & (names or present)):
                raise CheckpointError(
                    f"{path} and {self._homes[twice[0]]} both hold the tensor {twice[0]!r}, and there is no {INDEX} to "
                    "say which counts; remove one of the files"
                )
            self._homes |= dict.fromkeys(names or present, path)

    @property
    def names(self) -> set[str]:
        return set(self._homes)

    def dtypes(self) -> set[str]:
        """Names of the types that the tensors have."""
        found = {self._slice_of(name).get_dtype() for name in self._homes if not name.endswith(_DERIVED)}
        return {_TYPES.get(name, name) for name in found}

    def check(self, weights: dict[str, Weight], tied: bool, prefix: str = "") -> None:
        """Every tensor that the model needs is there in its shape, and nothing else that could matter.

        Tensors without the prefix are of other models.
        """
        wanted = {source.name: (source, weight.dtype) for weight in weights.values() for source in weight.sources}
        for name, (source, dtype) in wanted.items():
            shape = list(source.tensor_shape)
            if name not in self._homes:
                raise CheckpointError(
                    f"{self.folder} lacks the tensor {name!r} of shape {shape} that config.json asks for"
                )
            piece = self._slice_of(name)
            if list(piece.get_shape()) != shape:
                raise CheckpointError(
                    f"{self._homes[name]}: tensor {name!r} has shape {list(piece.get_shape())}, but config.json makes "
                    f"it {shape}; the two files do not belong together"
                )
            good = [kind for kind, name in _NARROW.items() if name == dtype] or list(_FLOATS)
            if piece.get_dtype() not in good:
                raise CheckpointError(
                    f"{self._homes[name]}: tensor {name!r} has type {piece.get_dtype()}, not one of {', '.join(good)}"
                )
        extra = sorted(
            name
            for name in self.names - set(wanted)
            if name.startswith(prefix)
            and not name.endswith(_DERIVED)
            and not (tied and name == f"{prefix}lm_head.weight")
        )
        if extra:
            raise CheckpointError(
                f"{self._homes[extra[0]]}: tensor {extra[0]!r} has no place in a model of this config.json "
                f"({len(extra)} such tensors); the two files do not belong together"
            )

    def read_scales(self, weight: Weight, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """As ``read``, of a quantized weight's scales. Raises CheckpointError for what no rounding makes."""
        scales = self.read(weight, index, dtype)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise CheckpointError(
                f"{self._homes[weight.sources[0].name]}: {weight.sources[0].name!r}, or scales that belong to it, "
                "hold what is no number above 0; fetch the file again"
            )
        return scales

    def read(self, weight: Weight, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part ``index`` of a weight, put together from its tensors and cast to ``dtype``.

        What is too large for that becomes infinite; ``weights.build`` finds it.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(index, weight.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for source in weight.sources:
            target, wanted = _overlap(source, bounds)
            if wanted is not None:
                with np.errstate(over="ignore"):
                    out[target] = self._read_split(source, wanted)
        return out

    def _read_split(self, source: Source, wanted: list[tuple[int, int]]) -> np.ndarray:
        """Ranges of ``source.split`` from the tensor, whose axes are runs of the split ones."""
        axes: list[slice] = []
        position = 0
        for size in source.shape:
            count, product = 0, 1
            while product < size or (count == 0 and position < len(source.split)):
                product *= source.split[position + count]
                count += 1
            assert product == size, (source.name, source.shape, source.split)
            start, stop = wanted[position]
            inner = math.prod(source.split[position + 1 : position + count])
            rest = wanted[position + 1 : position + count]
            assert all(r == (0, s) for r, s in zip(rest, source.split[position + 1 : position + count], strict=True))
            shift = 0 if axes else source.first_row
            axes.append(slice(shift + start * inner, shift + stop * inner))
            position += count
        data = self._slice_of(source.name)[tuple(axes)]
        return data.reshape([stop - start for start, stop in wanted])

    def _slice_of(self, name: str) -> Any:
        return self._open[self._homes[name]].get_slice(name)


def _overlap(
    source: Source, bounds: list[tuple[int, int]]
) -> tuple[tuple[int | slice, ...], list[tuple[int, int]] | None]:
    """Where a source meets a part of its weight: (place in the part, ranges of ``source.split``), None if nowhere."""
    target: list[int | slice] = []
    wanted: list[tuple[int, int]] = []
    for part, (start, stop) in zip(source.part, bounds, strict=True):
        if isinstance(part, int):
            if not start <= part < stop:
                return (), None
            target.append(part - start)
            continue
        low = part.start or 0
        high = low + source.split[len(wanted)]
        first, last = max(low, start), min(high, stop)
        if first >= last:
            return (), None
        target.append(slice(first - start, last - start))
        wanted.append((first - low, last - low))
    return tuple(target), wanted


def _files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The safetensors files of a folder, with the tensors that the index expects in each (None: all it has)."""
    if (folder / INDEX).is_file():
        try:
            weight_map = read_json(folder / INDEX).get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        names: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{folder / INDEX}: the file of {tensor!r} must be a name, not {file!r}")
            names.setdefault(file, set()).add(tensor)
        for file, tensors in sorted(names.items()):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX} names the file {file!r}; only *.safetensors beside it can be named"
                )
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / INDEX} names the file {file!r}, which is not there; fetch it")
            yield folder / file, tensors
        return
    if (folder / SINGLE).is_file():  # others beside it say the same in other words: consolidated.safetensors
        yield folder / SINGLE, None
        return
    if not has_safetensors(folder):
        raise CheckpointError(no_safetensors(folder))
    for path in sorted(folder.glob("*.safetensors")):
        yield path, None


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder has weights in safetensors, or an index that says so."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()


def no_safetensors(folder: Path) -> str:
    """What to say of a folder without."""
    pickled = sorted(path.name for suffix in ("bin", "pth", "pt") for path in folder.glob(f"*.{suffix}"))
    hint = f" ({pickled[0]} is a pickle, which is never read: convert it to safetensors)" if pickled else ""
    return f"{folder} has no safetensors file{hint}"
