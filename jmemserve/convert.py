"""Convert a model folder: Hugging Face safetensors to Orbax, and back, bit for bit.

    python -m jmemserve.convert SRC DST                 any form -> DST/orbax
    python -m jmemserve.convert SRC DST --to hf         any form -> DST/*.safetensors

config.json, generation_config.json and the tokenizer's files are copied; both folders can be served.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jmemserve.config import DTYPES, LoadFormat
from jmemserve.errors import ConfigError
from jmemserve.models import load_config, weights
from jmemserve.models.checkpoint import Checkpoint
from jmemserve.models.describe import describe
from jmemserve.models.export import save_safetensors
from jmemserve.models.fields import read_json
from jmemserve.models.orbax_io import save_orbax, saved_dtypes

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0; 2 with one sentence on stderr when it cannot be done; 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    start = time.monotonic()
    try:
        num_bytes = convert(arguments.source, arguments.target, arguments.to, arguments.dtype)
    except KeyboardInterrupt:
        print("\ncancelled; nothing was written", file=sys.stderr)
        return 130
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    print(f"{arguments.target}: {num_bytes / 1e6:,.1f} MB of weights as {arguments.to} in {seconds:.1f} s")
    return 0


def convert(source: Path, target: Path, to: str, dtype: str = "auto") -> int:
    """Write ``source``'s model into the new folder ``target`` as "orbax" or "hf"; returns the bytes of its weights.

    ``dtype`` "auto" keeps the bits: the type that the weights have, float32 if they have several. Raises ConfigError
    or CheckpointError when the source cannot be read or the target exists; then nothing is left behind.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already, and is never overwritten; remove it, or choose another folder")
    config = load_config(source)
    kind = _stored_dtype(source) if dtype == "auto" else dtype
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("model",))  # an accelerator may be smaller than the model
    total = weights.num_bytes(config, kind)
    with _bar("read", total) as bar:
        _, state = weights.load(
            source, LoadFormat.AUTO, config, kind, mesh, 0, lambda done, _: bar.update(done - bar.n)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with hidden as scratch, _bar("write", total) as bar:
        partial = Path(scratch) / "model"  # takes its name when it is whole
        partial.mkdir()
        _copy_texts(source, partial, kind)
        if to == "orbax":
            save_orbax(weights.flat(state), partial)
            bar.update(total)
        else:
            save_safetensors(partial, describe(config), weights.flat(state), bar.update)
            for path in partial.glob("*.safetensors"):
                shutil.copymode(partial / "config.json", path)  # safetensors lets nobody else read
        partial.rename(target)
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jmemserve.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder with config.json and weights")
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--to", choices=("orbax", "hf"), default="orbax", help="what to write (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto keeps the checkpoint's (default)"
    )
    return parser


def _stored_dtype(folder: Path) -> str:
    """The type that holds every stored weight exactly."""
    on_disk = weights.detect(folder)
    found = saved_dtypes(folder) if on_disk is LoadFormat.ORBAX else Checkpoint(folder).dtypes()
    found &= {*DTYPES}  # what is quantized keeps its own type
    return found.pop() if len(found) == 1 else "float32"


def _copy_texts(source: Path, target: Path, dtype: str) -> None:
    """Copy what is not weights; config.json as it is, unless it must name another type."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    raw = read_json(source / "config.json")
    keys = [key for key in ("dtype", "torch_dtype") if raw.get(key) is not None] or ["torch_dtype"]
    if all(raw.get(key) == dtype for key in keys):
        shutil.copyfile(source / "config.json", target / "config.json")
    else:
        (target / "config.json").write_text(json.dumps(raw | dict.fromkeys(keys, dtype), indent=2) + "\n")


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
