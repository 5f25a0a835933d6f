"""Writes tests/models/fixtures: tiny random checkpoints, with what transformers makes of them.

Needs torch and transformers 5, which nothing else here does: ``python tests/models/make_fixtures.py [NAME ...]``.
Weights are large and norms and biases random, so that every field of a config.json shows in the logits; a seed is taken
only if no step of its greedy continuations is a near tie.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

OUT = Path(__file__).parent / "fixtures"
VOCAB = 198  # even, so that the tables are split over two devices
PROMPTS = (1, 13, 40)  # tokens; the longest are beyond every sliding window
NEW_TOKENS = 24
MARGIN = 0.02  # least distance of the best logit to the next, in every greedy step
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "dtype": "float32",
}
GROUPED = COMMON | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {  # short factors up to 128 tokens, which no prompt of the reference reaches
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.25, 2.0],
    "long_factor": [1.5, 4.0, 16.0],
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8, "pad_token_id": 0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**GROUPED | GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=30.0),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GROUPED | GEMMA,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=GEMMA3_ROPE,
        ),
    ),
    "llama2": (LlamaForCausalLM, LlamaConfig(**COMMON, num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(**GROUPED, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    ),
    "llama_linear": (LlamaForCausalLM, LlamaConfig(**GROUPED, rope_parameters=LINEAR_ROPE)),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, head_dim=16, sliding_window=8)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**GROUPED | {"intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**GROUPED, pad_token_id=0, sliding_window=9)),
    "phi3_long": (
        Phi3ForCausalLM,
        Phi3Config(**GROUPED, pad_token_id=0, original_max_position_embeddings=128, rope_parameters=LONG_ROPE),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED, use_sliding_window=False)),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=32, tie_word_embeddings=True)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **GROUPED, head_dim=32, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, mlp_only_layers=[0]
        ),
    ),
}
SHARDED = {"qwen3": "100KB"}  # in several files with an index


def make_model(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.3 * noise if "norm" in name else (0.3 if weight.ndim == 2 else 0.5) * noise)
    model.tie_weights()
    return model


@torch.no_grad()
def reference(model: PreTrainedModel, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """Prompts, logits [T, V] and greedy tokens, by name and number; and the smallest margin of a greedy step."""
    rng = np.random.default_rng(seed)
    found, margin = {}, float("inf")
    for number, length in enumerate(PROMPTS):
        prompt = rng.integers(3, VOCAB, length)
        tokens = torch.tensor(prompt)[None]
        found[f"prompt{number}"] = prompt.astype(np.int32)
        found[f"logits{number}"] = model(tokens, use_cache=False).logits[0].numpy()
        for _ in range(NEW_TOKENS):
            logits = model(tokens, use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            margin = min(margin, best - second)
            tokens = torch.cat([tokens, logits.argmax()[None, None]], 1)
        found[f"greedy{number}"] = tokens[0, length:].numpy().astype(np.int32)
    return found, margin


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        kind, config = CASES[name]
        for seed in itertools.count():
            model = make_model(kind, config, seed)
            found, margin = reference(model, seed)
            if margin >= MARGIN:
                break
        folder = OUT / name
        model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "1GB"))
        np.savez_compressed(folder / "reference.npz", **found)
        print(f"{name}: seed {seed}, smallest margin {margin:.3f}", flush=True)


if __name__ == "__main__":
    main()
