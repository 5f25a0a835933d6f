"""config.json -> ModelConfig. What changes the numbers and is not supported is refused by name, never ignored."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Protocol

from jmemserve.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: angles are position * theta ** (-2 i / head_dim), scaled by kind."""

    theta: float = 10000.0
    kind: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_len: int = 8192  # llama3


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer; hashable, and everything that a checkpoint's config.json decides."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    max_model_len: int
    windows: tuple[int | None, ...]  # per layer: a token sees at most that many tokens, itself included
    attention_bias: bool = False  # on queries, keys and values
    qk_norm: bool = False  # RMS norm of each query and key head
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: frozenset[int] = frozenset()  # union of config.json and generation_config.json
    bos_token_id: int | None = None

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads


class Family(Protocol):
    """What a family's module says: how its config.json differs from the common one."""

    def traits(self, raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
        """Fields of ModelConfig that this family sets; it takes (pops) the keys that it understands."""
        ...


FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Keys that say nothing about the numbers of inference.
_HARMLESS = frozenset(
    """_name_or_path architectures model_type transformers_version use_cache initializer_range pad_token_id
    bos_token_id eos_token_id torch_dtype dtype attention_dropout pretraining_tp attn_implementation auto_map
    _attn_implementation output_attentions output_hidden_states return_dict tokenizer_class max_length
    chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder add_cross_attention
    cross_attention_hidden_size finetuning_task task_specific_params num_return_sequences unsloth_version
    sliding_window_pattern_unused unsloth_fixed use_return_dict tie_encoder_decoder classifier_dropout
    resid_pdrop attn_pdrop embd_pdrop hidden_dropout temperature top_k top_p do_sample""".split()
)


def load_config(folder: Path) -> ModelConfig:
    """Read ``folder``/config.json (and the eos ids of generation_config.json).

    Raises ConfigError for a missing or broken file, an unsupported architecture, or a field that would change the
    numbers in a way that is not implemented.
    """
    raw = read_json(folder / "config.json")
    names = raw.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise ConfigError(
            f"{folder / 'config.json'}: architecture {names[0]!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[names[0]]
    generation = folder / "generation_config.json"
    eos = _ids(raw.get("eos_token_id")) | (
        _ids(read_json(generation).get("eos_token_id")) if generation.exists() else set()
    )
    try:
        return _parse(dict(raw), family, frozenset(eos))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError when it cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _parse(raw: dict[str, Any], family: str, eos: frozenset[int]) -> ModelConfig:
    bos = raw.get("bos_token_id")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is not supported; supported are float32, bfloat16 and float16")
    hidden, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
    layers = _count(raw, "num_hidden_layers")
    kv_heads = raw.pop("num_key_value_heads", None) or heads
    head_dim = raw.pop("head_dim", None) or hidden // heads
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(f"{heads} heads cannot share {kv_heads} kv heads evenly, or head_dim {head_dim} is odd")
    if (act := raw.pop("hidden_act", "silu")) not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported; only silu is")
    max_len = _count(raw, "max_position_embeddings")
    common: dict[str, Any] = {
        "family": family,
        "vocab_size": _count(raw, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": _count(raw, "intermediate_size"),
        "norm_eps": float(raw.pop("rms_norm_eps", 1e-6)),
        "rope": _rope(raw, max_len),
        "tied_embeddings": bool(raw.pop("tie_word_embeddings", False)),
        "max_model_len": max_len,
        "windows": (None,) * layers,
        "dtype": dtype,
        "eos_token_ids": eos,
        "bos_token_id": bos if isinstance(bos, int) else None,
    }
    module: Family = importlib.import_module(f"jmemserve.models.{family}")
    traits = module.traits(raw, layers)
    for key, value in raw.items():
        if key not in _HARMLESS and value not in (None, False, [], {}):
            raise ConfigError(f"field {key!r} with value {value!r} is not supported for {family}")
    return ModelConfig(**(common | traits))


def layer_windows(raw: dict[str, Any], num_layers: int, use: bool) -> tuple[int | None, ...]:
    """Windows per layer from ``sliding_window``, ``layer_types`` and ``max_window_layers``; takes these keys."""
    window, kinds = raw.pop("sliding_window", None), raw.pop("layer_types", None)
    full_below = raw.pop("max_window_layers", None)
    raw.pop("use_sliding_window", None)
    if kinds is not None:
        known = {"full_attention", "sliding_attention"}
        if len(kinds) != num_layers or not set(kinds) <= known:
            raise ConfigError(f"layer_types must name {num_layers} layers, each one of {sorted(known)}, not {kinds}")
        if "sliding_attention" in kinds and not window:
            raise ConfigError("layer_types has sliding_attention, but there is no sliding_window")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if not use or window is None:
        return (None,) * num_layers
    return tuple(None if layer < (full_below or 0) else int(window) for layer in range(num_layers))


def _rope(raw: dict[str, Any], max_len: int) -> RopeConfig:
    """From rope_theta and rope_scaling, or from the newer rope_parameters."""
    fields = dict(raw.pop("rope_scaling", None) or {}) | dict(raw.pop("rope_parameters", None) or {})
    theta = float(fields.pop("rope_theta", None) or raw.pop("rope_theta", None) or 10000.0)
    raw.pop("rope_theta", None)
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    known: dict[str, dict[str, str]] = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_len",
        },
    }
    if kind not in known:
        raise ConfigError(f"rope scaling of type {kind!r} is not supported; supported are {', '.join(known)}")
    found = {ours: fields.pop(theirs) for theirs, ours in known[kind].items() if theirs in fields}
    if missing := set(known[kind].values()) - set(found) - {"original_max_len"}:
        raise ConfigError(f"rope scaling of type {kind!r} lacks {', '.join(sorted(missing))}")
    if unknown := {key: value for key, value in fields.items() if value is not None}:
        raise ConfigError(f"rope scaling of type {kind!r} has unknown fields {unknown}")
    return RopeConfig(theta=theta, kind=kind, **found)


def _count(raw: dict[str, Any], key: str) -> int:
    value = raw.pop(key, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be a positive whole number, not {value!r}")
    return value


def _ids(value: Any) -> set[int]:
    many = value if isinstance(value, list) else [value]
    return {item for item in many if isinstance(item, int) and not isinstance(item, bool)}
