"""What the machine itself can do, measured in the same run as whatever is compared with it."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after two that do not count."""
    for _ in range(2):
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def read_bandwidth(megabytes: int = 256, repeats: int = 9) -> float:
    """Bytes per second of reading device memory: the maximum of a large float32 array."""
    array = jnp.ones((megabytes << 20) // 4, jnp.float32)
    highest = jax.jit(jnp.max)
    return array.nbytes / median_seconds(lambda: highest(array), repeats)


def copy_bandwidth(megabytes: int = 256, repeats: int = 9) -> float:
    """Bytes read and written per second, of adding one to every number of a large array in place."""
    held = [jnp.zeros((megabytes << 20) // 4, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def once() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    return 2 * held[0].nbytes / median_seconds(once, repeats)


def matmul_rate(size: int = 2048, repeats: int = 9, dtype: str = "float32") -> float:
    """FLOP per second of XLA's matrix product at the best of half this size, this size and twice it."""
    best = 0.0
    product = jax.jit(jnp.matmul)
    for n in (size // 2, size, 2 * size):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        best = max(best, 2 * n**3 / median_seconds(lambda a=a: product(a, a), max(3, repeats // 2)))
    return best


def about() -> dict[str, str | int]:
    """Machine, versions and command, for the head of every result."""
    device = jax.devices()[0]
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "jmemserve": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
    }
