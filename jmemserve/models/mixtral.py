"""Mixtral: Mistral's attention; every feed-forward layer is a mixture of experts."""

from typing import Any

from jmemserve.models import mistral
from jmemserve.models.config import Experts
from jmemserve.models.fields import take_count

DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-5}
NAMES = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{part}" for part in ("w1", "w3", "w2")))


def traits(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The router's choices are made to sum to one."""
    count, each = take_count(raw, "num_local_experts", 8), take_count(raw, "num_experts_per_tok", 2)
    for key in ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        raw.pop(key, None)  # of training
    experts = Experts(count, each, True, frozenset(range(num_layers)), NAMES)
    return mistral.traits(raw, num_layers) | {"experts": experts}
