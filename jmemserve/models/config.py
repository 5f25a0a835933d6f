"""config.json -> ModelConfig. What changes the numbers and is not supported is refused by name, never ignored."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Protocol

from jmemserve.errors import ConfigError
from jmemserve.kernels.rule import Rule
from jmemserve.models.fields import is_whole, read_json, take_count, take_flag, take_ids, take_positive
from jmemserve.models.quantized import Quantized, take_quantized
from jmemserve.models.rope import RopeConfig, take_rope


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """Layers whose feed-forward part is a mixture of experts."""

    count: int
    per_token: int
    renormalise: bool  # the shares of the chosen ones are made to sum to one
    layers: frozenset[int]
    names: tuple[str, ...]  # in the checkpoint, of a layer: router, then gate, up and down with {} for the expert
    size: int | None = None  # of the inner layer; None: the model's intermediate_size

    def __post_init__(self) -> None:
        if self.per_token > self.count:
            raise ConfigError(f"each token goes to {self.per_token} experts, but there are {self.count}")


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
    out_norms: bool = False  # RMS norm also of what attention and the feed-forward part give to the stream
    norm_offset: float = 0.0  # added to every norm's weight: 1 where the checkpoint says how far they are from one
    activation: str = "silu"  # of the feed-forward part; one of ACTIVATIONS
    scaled_embeddings: bool = False  # by the square root of hidden_size
    beyond_float16: bool = False  # what it computes is larger than any float16
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    local_rope: RopeConfig | None = None  # of the layers that have a window; None: as all
    experts: Experts | None = None
    tensor_prefix: str = ""  # of the model's tensors, where the checkpoint holds other models beside it
    fused_tensors: bool = False  # the checkpoint has queries, keys and values in one tensor, and both inner halves too
    quantized: Quantized | None = None
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: frozenset[int] = frozenset()  # union of config.json and generation_config.json
    bos_token_id: int | None = None

    def rule(self, layer: int) -> Rule:
        """How a layer's tokens attend."""
        return Rule(self.attention_scale or self.head_dim**-0.5, self.windows[layer], self.attention_soft_cap)

    def for_lengths(self, longest: int) -> "ModelConfig":
        """The model for sequences of up to so many tokens."""
        return dataclasses.replace(self, rope=self.rope.for_lengths(longest))

    def round_weights(self, kind: str) -> "ModelConfig":
        """The same model with weights of a kind of quantized.DTYPES.

        Raises ConfigError if those of the checkpoint are of another kind.
        """
        if self.quantized is None:
            return dataclasses.replace(self, quantized=Quantized(kind, stored=False))
        if self.quantized.kind != kind:
            raise ConfigError(f"the checkpoint's weights are {self.quantized.kind} already, and cannot become {kind}")
        return self

    @property
    def stored(self) -> "ModelConfig":
        """The model as the checkpoint has it: without a rounding that is done while it is loaded."""
        if self.quantized is None or self.quantized.stored:
            return self
        return dataclasses.replace(self, quantized=None)

    @property
    def expert_size(self) -> int:
        """Of the inner layer of each expert."""
        assert self.experts is not None, self.family
        return self.experts.size or self.intermediate_size

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads


class Family(Protocol):
    """What a family's module says: how its config.json differs from the common one."""

    DEFAULTS: dict[str, Any]  # what transformers assumes where config.json is silent, if that is not the common value

    def traits(self, raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
        """Fields of ModelConfig that this family sets; it takes (pops) the keys that it understands."""
        ...


FAMILIES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# Where a model for text stands beside others, which are left out: what its tensors' names begin with.
_BESIDE_OTHERS = {"Gemma3ForConditionalGeneration": "language_model."}

# hidden_act -> ModelConfig.activation
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Keys that say nothing about the numbers of inference.
_HARMLESS = frozenset(
    """_name_or_path architectures model_type transformers_version use_cache initializer_range pad_token_id
    sep_token_id decoder_start_token_id attention_dropout classifier_dropout resid_pdrop attn_pdrop embd_pdrop
    hidden_dropout pretraining_tp attn_implementation _attn_implementation _attn_implementation_autoset auto_map
    output_attentions output_hidden_states return_dict use_return_dict return_dict_in_generate output_scores
    tokenizer_class prefix max_length min_length chunk_size_feed_forward id2label label2id problem_type
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    finetuning_task task_specific_params num_return_sequences unsloth_version unsloth_fixed temperature top_k top_p
    typical_p do_sample early_stopping num_beams num_beam_groups diversity_penalty length_penalty
    repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size exponential_decay_length_penalty
    bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    pruned_heads torchscript tf_legacy_loss use_bfloat16""".split()
)


def load_config(folder: Path) -> ModelConfig:
    """Read ``folder``/config.json (and the eos ids of generation_config.json).

    Raises ConfigError for a missing or broken file, an unsupported architecture, or a field that would change the
    numbers in a way that is not implemented.
    """
    path = folder / "config.json"
    raw = read_json(path)
    generation = folder / "generation_config.json"
    more = read_json(generation) if generation.exists() else {}
    try:
        eos = take_ids(more, "eos_token_id")
    except ConfigError as error:
        raise ConfigError(f"{generation}: {error}") from None
    try:
        return _parse(raw, eos)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(raw: dict[str, Any], more_eos: frozenset[int]) -> ModelConfig:
    architecture = _architecture(raw)
    family, prefix = FAMILIES[architecture], _BESIDE_OTHERS.get(architecture, "")
    module: Family = importlib.import_module(f"jmemserve.models.{family}")
    raw = module.DEFAULTS | (_text_model(raw) if prefix else raw)
    hidden, heads = take_count(raw, "hidden_size"), take_count(raw, "num_attention_heads")
    layers = take_count(raw, "num_hidden_layers")
    kv_heads = take_count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = take_count(raw, "head_dim", hidden // heads if hidden % heads == 0 else None)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd, but rotary embedding turns pairs")
    traits = module.traits(raw, layers)
    traits.setdefault("rope", take_rope(raw))
    for rope in (traits["rope"], traits.get("local_rope")):
        if rope is not None:
            rope.check(head_dim)
    act = raw.pop("hidden_act", "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {act!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    bos = raw.pop("bos_token_id", None)
    common: dict[str, Any] = {
        "family": family,
        "vocab_size": take_count(raw, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": take_count(raw, "intermediate_size"),
        "norm_eps": take_positive(raw, "rms_norm_eps", 1e-6),  # the default of every family
        "activation": ACTIVATIONS[act],
        "tied_embeddings": take_flag(raw, "tie_word_embeddings"),
        "max_model_len": take_count(raw, "max_position_embeddings"),
        "windows": (None,) * layers,
        "tensor_prefix": prefix,
        "quantized": take_quantized(raw),
        "dtype": _take_dtype(raw),
        "eos_token_ids": take_ids(raw, "eos_token_id") | more_eos,
        "bos_token_id": bos if is_whole(bos) else None,
    }
    for key, value in raw.items():
        switched_off = value is None or value is False or value == [] or value == {}  # 0 may mean something
        if key not in _HARMLESS and not switched_off:
            raise ConfigError(f"field {key!r} with value {value!r} is not supported for {family}")
    return ModelConfig(**(common | traits))


def layer_windows(raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Windows per layer, as the Qwen families say them; takes the keys that have to do with it."""
    use, kinds = take_flag(raw, "use_sliding_window"), raw.pop("layer_types", None)
    window, full_below = raw.pop("sliding_window", None), raw.pop("max_window_layers", None)
    if kinds is None:
        if not use or window is None:
            return (None,) * num_layers
        if not is_whole(full_below) or full_below < 0:
            raise ConfigError(f"max_window_layers must be a whole number, not {full_below!r}")
        kinds = ["full_attention" if layer < full_below else "sliding_attention" for layer in range(num_layers)]
    windows = windows_by_kind(kinds, window, num_layers)
    if any(windows) and not use:
        raise ConfigError("layer_types has sliding_attention, but use_sliding_window is not true")
    return windows


def windows_by_kind(kinds: Any, window: Any, num_layers: int) -> tuple[int | None, ...]:
    """Windows per layer, from layer_types and sliding_window."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise ConfigError(f"layer_types must name {num_layers} layers, each one of {', '.join(known)}, not {kinds!r}")
    if "sliding_attention" not in kinds:
        return (None,) * num_layers
    size = take_count({"sliding_window": window}, "sliding_window")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _text_model(raw: dict[str, Any]) -> dict[str, Any]:
    """The text_config, with what stands beside it and is of all models together."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"text_config must be an object, not {text!r}")
    shared = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "quantization_config")
    return text | {key: raw[key] for key in shared if raw.get(key) is not None}


def _architecture(raw: dict[str, Any]) -> str:
    """One of FAMILIES."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"architectures must be a list that begins with one of {', '.join(FAMILIES)}, not {names!r}")
    if names[0] not in FAMILIES:
        raise ConfigError(f"architecture {names[0]!r} is not supported; supported are {', '.join(FAMILIES)}")
    own = raw.get("auto_map")
    if isinstance(own, dict) and any(key.startswith("AutoModel") for key in own):
        raise ConfigError("auto_map names a model's own code, which is never run; the numbers could differ from ours")
    return names[0]


def _take_dtype(raw: dict[str, Any]) -> str:
    """Of the checkpoint: ``dtype``, or ``torch_dtype`` as it was once called."""
    older = raw.pop("torch_dtype", None)
    found = raw.pop("dtype", None) or older or "float32"
    dtype = str(found).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is not supported; supported are float32, bfloat16 and float16")
    return dtype
