"""Qwen3 (dense): RMS norm on each query and key head, biases only if config.json says so."""

from typing import Any

from jmemserve.errors import ConfigError
from jmemserve.models.config import layer_windows


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    if raw.pop("attention_bias", False):
        raise ConfigError("field 'attention_bias' with value True is not supported for qwen3")
    use = bool(raw.get("use_sliding_window", False))
    return {"qk_norm": True, "windows": layer_windows(raw, num_layers, use)}
