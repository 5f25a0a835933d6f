"""Qwen2 and 2.5: biases on queries, keys and values; a sliding window on the upper layers if it is switched on."""

from typing import Any

from jmemserve.models.config import layer_windows

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Biases always, windows if config.json says so."""
    return {"attention_bias": True, "windows": layer_windows(raw, num_layers)}
