"""Phi-3 and Phi-4: Llama's shape from fused tensors, with a sliding window if config.json has one.

Long contexts by rope scaling of type longrope, and rotation of a part of each head, are refused.
"""

from typing import Any

from jmemserve.models.fields import refuse_flags, take_count

DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """One window for all layers."""
    refuse_flags(raw, "attention_bias")
    raw.pop("original_max_position_embeddings", None)  # of longrope
    window = raw.pop("sliding_window", None)
    size = None if window is None else take_count({"sliding_window": window}, "sliding_window")
    return {"fused_tensors": True, "windows": (size,) * num_layers}
