"""Llama 2, 3 and 3.x."""

from typing import Any

from jmemserve.models.fields import refuse_flags

DEFAULTS: dict[str, Any] = {}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Nothing beyond the common shape; biases, which some descendants have, are refused."""
    refuse_flags(raw, "attention_bias", "mlp_bias")
    return {}
