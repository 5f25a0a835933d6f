"""Weights in 8 bits: per row of a product whole numbers, or small floats, and one scale.

Only weights are rounded, never activations: a product is made with the rounded weight in the activations' type, summed
in float32, and then scaled, so nothing but the weight's own rounding is lost. Embeddings, norms, biases, routers and
the output head stay as they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jmemserve.errors import ConfigError

DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """How a model's weights are rounded."""

    kind: str  # of DTYPES
    stored: bool  # the checkpoint has them so; else they are rounded while they are loaded

    @property
    def dtype(self) -> str:
        return DTYPES[self.kind]


def take_quantized(raw: dict[str, Any]) -> Quantized | None:
    """From quantization_config, in the form of compressed-tensors. Raises ConfigError for what is not supported.

    Rounding of activations that it asks for is not done: it is for hardware that multiplies in 8 bits, and loses more.
    """
    given = raw.pop("quantization_config", None)
    if not given:
        return None
    if not isinstance(given, dict) or given.get("quant_method") != "compressed-tensors":
        raise ConfigError("quantization_config is not supported; only quant_method 'compressed-tensors' is")
    for key in ("kv_cache_scheme", "transform_config"):
        if given.get(key):
            raise ConfigError(f"quantization_config: {key} is not supported")
    if (form := given.get("format")) not in (None, *FORMATS):
        raise ConfigError(f"quantization_config: format {form!r} is not supported, only {' and '.join(FORMATS)}")
    ignore = given.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise ConfigError(f"quantization_config: ignore must be a list of names, not {ignore!r}")
    sparsity = given.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") != "dense"):
        raise ConfigError("quantization_config: sparsity is not supported")
    groups = given.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict) or group.get("targets") != ["Linear"]:
        raise ConfigError("quantization_config: config_groups must be one group, with weights, for targets ['Linear']")
    if group.get("output_activations"):
        raise ConfigError("quantization_config: output_activations are not supported")
    wanted = {"num_bits": 8, "strategy": "channel", "symmetric": True, "group_size": None, "actorder": None}
    for key, value in wanted.items():
        if weights.get(key) != value:
            raise ConfigError(
                f"quantization_config: weights of {key} {weights.get(key)!r} are not supported, only {value!r}"
            )
    kinds = {"int": "int8", "float": "fp8"}
    if (kind := weights.get("type")) not in ("int", "float"):
        raise ConfigError(f"quantization_config: weights of type {kind!r} are not supported, only int and float")
    return Quantized(kinds[kind], stored=True)


def quantize(
    array: jax.Array, inputs: int, dtype: str, shardings: tuple[NamedSharding, NamedSharding]
) -> tuple[jax.Array, jax.Array]:
    """array [..., inputs] -> (rounded in ``dtype``, its scales f32[..., 1]): the last ``inputs`` axes share a scale."""
    return _rounding(inputs, dtype, shardings)(array)


@functools.cache
def _rounding(inputs: int, dtype: str, shardings: tuple[NamedSharding, NamedSharding]):
    def make(array: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = tuple(range(-inputs, 0))
        wide = array.astype(jnp.float32)
        largest = jnp.abs(wide).max(axes, keepdims=True)
        scale = jnp.where(largest == 0, 1, largest / _LARGEST[dtype])
        values = wide / scale
        values = jnp.round(values) if dtype == "int8" else values
        return values.astype(dtype), scale.reshape(*array.shape[:-inputs], 1)

    return jax.jit(make, out_shardings=shardings)
