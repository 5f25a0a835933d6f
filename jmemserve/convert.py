"""Convert a model folder: Hugging Face safetensors to Orbax, and back, bit for bit.

    python -m jmemserve.convert SRC DST                 safetensors -> DST/orbax
    python -m jmemserve.convert SRC DST --to hf         orbax -> DST/model.safetensors

config.json, generation_config.json and the tokenizer's files are copied; both folders can be served.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tqdm import tqdm

from jmemserve.config import LoadFormat
from jmemserve.errors import ConfigError
from jmemserve.models import ModelConfig, load_config, weights
from jmemserve.models.describe import Weight, describe

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m jmemserve.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder with config.json and weights")
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--to", choices=("orbax", "hf"), default="orbax", help="what to write (default orbax)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's"
    )
    args = parser.parse_args(argv)
    start = time.monotonic()
    try:
        num_bytes = convert(args.source, args.target, args.to, args.dtype)
    except (ConfigError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {num_bytes / 1e6:,.1f} MB of weights as {args.to} in {time.monotonic() - start:.1f} s")
    return 0


def convert(source: Path, target: Path, to: str, dtype: str = "auto") -> int:
    """Write ``source``'s model into the new folder ``target`` as "orbax" or "hf"; returns the bytes of its weights.

    Raises ConfigError or CheckpointError when the source cannot be read or the target exists; then nothing is left.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; choose a folder that does not, or remove it")
    config = load_config(source)
    kind = config.dtype if dtype == "auto" else dtype
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with tqdm(total=weights.num_bytes(config, kind), unit="B", unit_scale=True, desc="read") as bar:
        state = weights.load(
            source, LoadFormat.AUTO, config, kind, mesh, 0, lambda done, total: bar.update(done - bar.n)
        )[1]
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if to == "orbax":
            weights.save_orbax(state, partial)
        else:
            tensors = as_checkpoint(config, {path: np.asarray(array) for path, array in weights.flat(state).items()})
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return weights.num_bytes(config, kind)


def as_checkpoint(config: ModelConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take fused weights apart into the tensors of a Hugging Face checkpoint."""
    tensors: dict[str, np.ndarray] = {}
    for path, weight in describe(config).items():
        tensors |= _apart(weight, arrays[path])
    return tensors


def _apart(weight: Weight, array: np.ndarray) -> dict[str, np.ndarray]:
    return {source.name: np.ascontiguousarray(array[source.part].reshape(source.shape)) for source in weight.sources}


if __name__ == "__main__":
    sys.exit(main())
