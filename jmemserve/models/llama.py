"""Llama 2, 3 and 3.x."""

from typing import Any

from jmemserve.errors import ConfigError


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Nothing beyond the common shape; biases, which some descendants have, are refused."""
    for key in ("attention_bias", "mlp_bias"):
        if raw.pop(key, False):
            raise ConfigError(f"field {key!r} with value True is not supported for llama")
    return {}
