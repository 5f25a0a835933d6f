"""Strict set-up for every test: eight virtual devices, no silent broadcasting of ranks, warnings are errors."""

import os

import jax

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
