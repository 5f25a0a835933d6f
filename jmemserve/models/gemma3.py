"""Gemma 3, its model for text: Gemma 2 with norms of queries and keys; layers with a window rotate otherwise."""

from typing import Any

from jmemserve.errors import ConfigError
from jmemserve.models import gemma2
from jmemserve.models.fields import take_count, take_positive
from jmemserve.models.rope import RopeConfig, take_rope

DEFAULTS: dict[str, Any] = gemma2.DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Five layers with a window, then one without, unless config.json says otherwise."""
    rope, local = _ropes(raw)
    every = take_count(raw, "sliding_window_pattern", 6)
    return gemma2.gemma(raw, num_layers, every) | {"qk_norm": True, "rope": rope, "local_rope": local}


def _ropes(raw: dict[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers without a window and of those with one: two objects in rope_parameters, or the older fields."""
    outer = {"rope_theta": take_positive(raw, "rope_theta")}
    inner = {"rope_theta": take_positive(raw, "rope_local_base_freq")}
    both = raw.pop("rope_parameters", None) or {}
    if not isinstance(both, dict) or not set(both) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"rope_parameters must have full_attention and sliding_attention, not {both!r}")
    rope = take_rope(
        outer | {"rope_scaling": raw.pop("rope_scaling", None), "rope_parameters": both.get("full_attention")}
    )
    return rope, take_rope(inner | {"rope_parameters": both.get("sliding_attention")})
