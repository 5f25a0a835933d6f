"""Qwen2 and 2.5: biases on queries, keys and values; a sliding window on the upper layers if it is switched on."""

from typing import Any

from jmemserve.models.config import layer_windows


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    use = bool(raw.get("use_sliding_window", False))
    return {"attention_bias": True, "windows": layer_windows(raw, num_layers, use)}
