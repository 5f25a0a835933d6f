"""Gemma 2: layers with and without a window in turn, soft caps on scores and logits, norms before and after each part.

Its checkpoints say how far the norms' weights are from one.
"""

from typing import Any

from jmemserve.models.config import windows_by_kind
from jmemserve.models.fields import refuse_flags, take_cap, take_positive

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
HARMLESS = ("cache_implementation", "_sliding_window_pattern")  # the latter has become layer_types


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The first layer has a window, the second has none, and so on."""
    return gemma(raw, num_layers, every=2)


def gemma(raw: dict[str, Any], num_layers: int, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; unless config.json names the layers, one in ``every`` has no window."""
    refuse_flags(raw, "attention_bias", "use_bidirectional_attention")
    for key in HARMLESS:
        raw.pop(key, None)
    raw["hidden_act"] = (
        raw.pop("hidden_activation", None) or "gelu_pytorch_tanh"
    )  # hidden_act itself counts for nothing
    kinds = raw.pop("layer_types", None) or [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)
    ]
    return {
        "windows": windows_by_kind(kinds, raw.pop("sliding_window", None), num_layers),
        "out_norms": True,
        "norm_offset": 1.0,
        "scaled_embeddings": True,
        "beyond_float16": True,
        "attention_scale": take_positive(raw, "query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": take_cap(raw, "attn_logit_softcapping"),
        "logit_soft_cap": take_cap(raw, "final_logit_softcapping"),
    }
