"""Phi-3, 3.5 and 4: Llama's shape from fused tensors, with a sliding window if config.json has one."""

from typing import Any

from jmemserve.models.fields import refuse_flags, take_count

DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """One window for all layers."""
    refuse_flags(raw, "attention_bias")
    original, scaling = raw.pop("original_max_position_embeddings", None), raw.get("rope_scaling")
    if isinstance(scaling, dict):
        raw["rope_scaling"] = {"original_max_position_embeddings": original} | scaling
    window = raw.pop("sliding_window", None)
    size = None if window is None else take_count({"sliding_window": window}, "sliding_window")
    return {"fused_tensors": True, "windows": (size,) * num_layers}
