"""What real compilers make for GPUs, without one: `make test-cuda` installs JAX for CUDA and runs this.

XLA compiles the engine's whole step for an H200 that is not there: pages stay where they are, nothing loops, kernels
are few. Mosaic GPU and ptxas compile attention to machine code for every generation, with a driver that only says
which: no kernel needs more registers or shared memory than there are.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmemserve.engine.mesh import AXIS
from jmemserve.engine.orders import num_ints
from jmemserve.engine.runner import _make_step
from jmemserve.kernels.pages import page_axes
from jmemserve.models import load_config
from jmemserve.models.config import ModelConfig
from jmemserve.models.decoder import Decoder
from jmemserve.scheduler.plan import StepShape

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(not PLUGIN, reason="JAX for CUDA is not installed; make test-cuda does it"),
]

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
LAYERS, PAGES, LONGEST = 3, 20_000, 8192


@functools.cache
def mesh_of(count: int) -> Mesh:
    """Of H200s that can be compiled for and nothing else."""
    found = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{count}")
    return Mesh(np.array(found.devices), (AXIS,))


def model(tmp_path: Path, name: str, **changes) -> ModelConfig:
    """That of a benchmark with few layers."""
    raw = json.loads((ROOT / "benchmarks" / "configs" / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": LAYERS} | changes))
    return load_config(tmp_path).for_lengths(LONGEST)


def compile_step(config: ModelConfig, shape: StepShape, devices: int, backend: str = "mosaic_gpu"):
    """-> (the compiled step, bytes of a device's part of the pages)."""
    mesh = mesh_of(devices)
    sizes, everywhere = dict(mesh.shape), NamedSharding(mesh, P())

    def param(path: str, weight) -> nnx.Param:
        sharding = NamedSharding(mesh, P(*weight.spec(sizes)))
        return nnx.Param(jax.ShapeDtypeStruct(weight.shape, jnp.dtype(weight.dtype or "bfloat16"), sharding=sharding))

    graph, state = nnx.split(Decoder(config, param))
    leaves, structure = jax.tree.flatten(state)
    own = NamedSharding(mesh, P(*page_axes(True)))
    layout = (PAGES, LAYERS, 2, config.num_kv_heads, 16, config.head_dim)
    pages = jax.ShapeDtypeStruct(layout, jnp.bfloat16, sharding=own)
    width = LONGEST // 16
    last, ints = (
        jax.ShapeDtypeStruct((count,), jnp.int32, sharding=everywhere) for count in (shape.seqs, num_ints(shape, width))
    )
    step = _make_step(graph, structure, mesh, backend, shape.seqs)
    jitted = jax.jit(step, static_argnums=4, donate_argnums=1, out_shardings=(own, everywhere, everywhere))
    lowered = jitted.trace(leaves, pages, last, ints, (shape, width)).lower(lowering_platforms=("cuda",))
    return lowered.compile(), pages.size * 2 // devices


def launches(text: str) -> list[str]:
    """The operations of the entry of optimised HLO that do something."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    found = re.findall(r"= .*? ([a-z][a-z0-9-]*)\(", entry)
    return [name for name in found if name not in ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")]


@pytest.mark.parametrize("name, most", [("llama-3.1-8b", 16), ("qwen3-8b", 18)])
@pytest.mark.parametrize("shape", [StepShape(2, 2), StepShape(64, 64), StepShape(2048, 64)], ids=str)
def test_a_step_writes_in_place_and_is_few_kernels(tmp_path: Path, name: str, most: int, shape: StepShape) -> None:
    step, pages = compile_step(model(tmp_path, name), shape, 1)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes < pages / 4
    assert " while(" not in text, "a loop whose end the host has to look for"
    mixed = shape.tokens > shape.seqs
    assert len(launches(text)) < (most + 4 * mixed) * LAYERS + 25


def test_two_devices_meet_twice_a_layer(tmp_path: Path) -> None:
    step, pages = compile_step(model(tmp_path, "llama-3.1-8b"), StepShape(64, 64), 2)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory.alias_size_in_bytes >= pages and memory.temp_size_in_bytes < pages / 4
    sums = [name for name in launches(text) if name in ("all-reduce", "all-reduce-start")]
    assert 2 * LAYERS <= len(sums) <= 2 * LAYERS + 4
    assert " all-gather(" not in text.split("\nENTRY")[1].split("logits")[0], "no weight and no page is gathered"


MIXTURE = {  # Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [StepShape(2, 2), StepShape(64, 64), StepShape(2048, 64)], ids=str)
def test_a_mixture_is_few_kernels_and_copies_no_experts(
    tmp_path: Path, shape: StepShape, devices: int, kind: str | None
) -> None:
    config = model(tmp_path, "qwen3-8b", **MIXTURE)
    step, _ = compile_step(config if kind is None else config.round_weights(kind), shape, devices)
    text, smallest = step.as_text(), 128 * 2048 * 768 * (2 if kind is None else 1) // devices
    rounds = shape.tokens > 256  # for which there are 256 columns of every expert
    assert step.memory_analysis().temp_size_in_bytes < (400 << 20 if rounds else smallest / 2)
    assert text.count(" while(") == LAYERS * rounds
    assert len(launches(text)) < 36 * LAYERS + 25
    sums = [name for name in launches(text) if name in ("all-reduce", "all-reduce-start")]
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == len(sums), "none in a loop"
    assert len(sums) <= (2 * LAYERS + 4) * (devices - 1)


# -- machine code ------------------------------------------------------------------------------------------------------

LLAMA, LLAMA_2, SMALL, GEMMA, PHI = (8, 4, 128), (40, 1, 128), (2, 7, 64), (8, 2, 256), (32, 1, 96)
GPUS = [
    ("mosaic_gpu", "NVIDIA H200", "9.0", 232_448),
    ("mosaic_ampere", "NVIDIA A100-SXM4-80GB", "8.0", 166_912),
    ("mosaic_ampere", "NVIDIA L4", "8.9", 101_376),
    ("mosaic_mma", "NVIDIA B200", "10.0", 232_448),
    ("mosaic_mma", "NVIDIA GeForce RTX 5090", "12.0", 101_376),
]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a driver without a GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source, library = HERE / "gpu_driver.c", folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend, kind, capability, shared", GPUS, ids=[gpu[1] for gpu in GPUS])
def test_ptxas_takes_the_kernels(
    tmp_path: Path, driver: Path, backend: str, kind: str, capability: str, shared: int
) -> None:
    tools = importlib.util.find_spec("nvidia.cu13")
    assert tools is not None and tools.submodule_search_locations
    blocks = (LLAMA, 16), (LLAMA, 256), (LLAMA_2, 64), (SMALL, 32), (GEMMA, 16), (PHI, 16)
    cases = [(*heads, block, 1024, 64) for heads, block in blocks]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "COMPUTE_CAPABILITY": capability.replace(".", ""),
        "SHARED_MEMORY": str(shared),
        "LD_LIBRARY_PATH": str(driver),
        "PATH": f"{tools.submodule_search_locations[0]}/bin:{os.environ['PATH']}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
    }
    command = [sys.executable, str(HERE / "gpu_ptxas.py"), backend, kind, capability, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kernels) == 2 * len(cases), "one for rows with one token, one for the others"
    for kernel in kernels:
        assert kernel["done"], "ptxas refused it, or it wants more shared memory than there is: " + str(kernel)
        # jax 0.12 compiles a unit to be linked here, in which warpgroups cannot hand registers to each other.
        if "'setmaxnreg' ignored" not in kernel["log"]:
            assert kernel["spilled"] <= 128 and "serialized" not in kernel["log"], kernel["log"]
