"""Strict set-up for every test: eight virtual devices, no silent broadcasting of ranks, warnings are errors.

Programs are compiled once per run: a cache on disk, made anew for every run, serves all tests that build an engine
of the same shape.
"""

import os
import tempfile

import jax

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

_compiled = tempfile.TemporaryDirectory(prefix="jmemserve-tests-")
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure() -> None:
    _compiled.cleanup()
