"""Mistral: Llama's shape, with a sliding window on every layer unless config.json sets it to null."""

from typing import Any

from jmemserve.models.fields import take_count

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """One window for all layers."""
    if raw["sliding_window"] is None:
        return {}
    return {"windows": (take_count(raw, "sliding_window"),) * num_layers}
