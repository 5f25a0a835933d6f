"""Qwen3 (dense): RMS norm on each query and key head; a sliding window as in Qwen2; biases are refused."""

from typing import Any

from jmemserve.models.config import layer_windows
from jmemserve.models.fields import refuse_flags

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Norms of queries and keys always, windows if config.json says so."""
    refuse_flags(raw, "attention_bias")
    return {"qk_norm": True, "windows": layer_windows(raw, num_layers)}
