"""Mistral: Llama's shape, with a sliding window on every layer if config.json has one."""

from typing import Any

from jmemserve.models.config import layer_windows


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    return {"windows": layer_windows(raw, num_layers, use=True)}
