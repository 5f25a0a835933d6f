"""Qwen3 with mixtures of experts: Qwen3's attention; a mixture in every layer, or in every so many."""

from typing import Any

from jmemserve.errors import ConfigError
from jmemserve.models import qwen3
from jmemserve.models.config import Experts
from jmemserve.models.fields import is_whole, take_count, take_flag

DEFAULTS: dict[str, Any] = qwen3.DEFAULTS | {"num_key_value_heads": 4, "head_dim": None}
NAMES = ("mlp.gate", *(f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")))


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Layers are dense where mlp_only_layers or decoder_sparse_step say so."""
    also = raw.pop("num_local_experts", None)  # as transformers 5 calls it
    count, each = take_count(raw, "num_experts", also or 128), take_count(raw, "num_experts_per_tok", 8)
    if also not in (None, count):
        raise ConfigError(f"num_experts {count} and num_local_experts {also!r} differ")
    size, every = take_count(raw, "moe_intermediate_size", 768), take_count(raw, "decoder_sparse_step", 1)
    dense = raw.pop("mlp_only_layers", None) or []
    if not isinstance(dense, list) or not all(is_whole(layer) and 0 <= layer < num_layers for layer in dense):
        raise ConfigError(f"mlp_only_layers must be a list of layers, not {dense!r}")
    for key in ("router_aux_loss_coef", "output_router_logits"):
        raw.pop(key, None)  # of training
    layers = frozenset(layer for layer in range(num_layers) if (layer + 1) % every == 0) - set(dense)
    experts = Experts(count, each, take_flag(raw, "norm_topk_prob"), layers, NAMES, size)
    return qwen3.traits(raw, num_layers) | {"experts": experts if layers else None}
