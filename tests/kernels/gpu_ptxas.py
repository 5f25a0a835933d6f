"""A process that compiles attention for a GPU that is not there, down to machine code, and says what ptxas says.

    python gpu_ptxas.py BACKEND "DEVICE KIND" CAPABILITY '[[kv heads, group, head dim, block, tokens, rows], ...]'

It writes a line of JSON per kernel. The environment names a driver without a GPU (``gpu_driver.c``) and a folder for
what the compiler tells (MOSAIC_GPU_DUMP_TO); ``test_compiled_for_gpus.py`` starts it.
"""

import ctypes
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jmemserve.kernels import Ragged, attention_backend
from jmemserve.kernels.rule import Rule


@dataclasses.dataclass(frozen=True)
class Device(jax.sharding.AbstractDevice):
    """One that is not here."""

    compute_capability: str = ""


def lower(backend: str, device: Device, sizes: tuple[int, ...]) -> None:
    """One layer's attention, whose kernels are then known to Mosaic GPU."""
    kv_heads, group, head_dim, block, tokens, rows = sizes
    made, attend = jax.ShapeDtypeStruct, attention_backend(backend)
    shapes = ((tokens,), (tokens,), (rows, 8192 // block), (rows,), (rows + 1,))
    ragged = Ragged(*(made(shape, jnp.int32) for shape in shapes))
    q, kv = (made((tokens, heads, head_dim), "bfloat16") for heads in (kv_heads * group, kv_heads))
    pages = made((1000, 2, 2, kv_heads, block, head_dim), "bfloat16")

    def layer(q, k, v, pages, ragged):
        return attend(q, k, v, pages, 1, ragged, Rule(head_dim**-0.5))

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        jax.jit(layer, donate_argnums=3).trace(q, kv, kv, pages, ragged).lower(lowering_platforms=("cuda",))


def main() -> None:
    import jax_plugins.xla_cuda13 as plugin
    from jax.experimental.mosaic.gpu import core

    backend, kind, capability, cases = sys.argv[1:]
    device = Device(device_kind=kind, num_cores=132, platform="gpu", compute_capability=capability)
    compiled = ctypes.CDLL(plugin._get_library_path()).MosaicGpuCompile
    compiled.argtypes, compiled.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    told = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for sizes in json.loads(cases):
        core.KNOWN_KERNELS.clear()
        lower(backend, device, tuple(sizes))
        for module in core.KNOWN_KERNELS.values():
            for old in told.iterdir():
                old.unlink()
            done = compiled(module, len(module))
            log = "".join(path.read_text() for path in told.glob("*.ptxas"))
            numbers = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
            found = {name: int(match[1]) for name, text in numbers.items() if (match := re.search(text, log))}
            print(json.dumps({"sizes": sizes, "done": bool(done), "log": log, **found}), flush=True)


if __name__ == "__main__":
    main()
