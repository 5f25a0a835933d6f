"""config.json: what is read out of it, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmemserve.errors import ConfigError
from jmemserve.models import ModelConfig, load_config

ABSENT = object()
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(folder: Path, family: str = "Llama", **changes: Any) -> ModelConfig:
    raw = BASE | {"architectures": [f"{family}ForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ABSENT}))
    return load_config(folder)


def refused(folder: Path, family: str = "Llama", **changes: Any) -> str:
    """The sentence, which begins with the file."""
    with pytest.raises(ConfigError) as caught:
        read(folder, family, **changes)
    sentence = str(caught.value)
    assert sentence.startswith(f"{folder / 'config.json'}: ")
    return sentence


def rounded(**weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    given = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "int", "group_size": None} | weights
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    group = {"input_activations": activations, "output_activations": None, "targets": ["Linear"], "weights": given}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "kv_cache_scheme": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": ABSENT}, "architectures must be a list"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu']"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "only quant_method 'compressed-tensors'"),
        ({"quantization_config": rounded(num_bits=4)}, "weights of num_bits 4"),
        ({"quantization_config": rounded(strategy="group")}, "weights of strategy 'group'"),
        ({"quantization_config": rounded(symmetric=False)}, "weights of symmetric False"),
        ({"quantization_config": rounded(type="nf4")}, "weights of type 'nf4'"),
        ({"quantization_config": rounded() | {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme"),
        ({"quantization_config": rounded() | {"sparsity_config": {"format": "2:4"}}}, "sparsity"),
        ({"quantization_config": rounded(group_size=128)}, "weights of group_size 128"),
        ({"quantization_config": rounded(actorder="weight")}, "weights of actorder 'weight'"),
        ({"quantization_config": rounded() | {"format": "pack-quantized"}}, "format 'pack-quantized'"),
        ({"quantization_config": rounded() | {"ignore": 5}}, "ignore must be a list of names"),
        ({"quantization_config": rounded() | {"config_groups": {}}}, "config_groups must be one group"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"logit_scale": 0.5}, "field 'logit_scale' with value 0.5 is not supported for llama"),
        ({"embedding_multiplier": 0}, "embedding_multiplier"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"vocab_size": True}, "vocab_size must be a positive whole number, not True"),
        ({"hidden_size": ABSENT}, "hidden_size must be a positive whole number, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"num_key_value_heads": -2}, "num_key_value_heads"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_size": 18}, "head_dim"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope scaling of type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope scaling of type ['linear'] is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling of type 'linear': factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number above 0"),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 1}}, "unknown fields {'beta_fast': 1}"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor (4.0) must be below"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "unknown fields"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 turns 1 of 4 values"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 turns 6 of 4 values"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(tmp_path: Path, changes: dict, words: str) -> None:
    assert words in refused(tmp_path, **changes)


def test_refusals_of_families(tmp_path: Path) -> None:
    assert "sliding_window" in refused(tmp_path, "Mistral", sliding_window="x")
    assert "sliding_window" in refused(tmp_path, "Mistral", sliding_window=0)
    assert "layer_types" in refused(tmp_path, "Mistral", layer_types=["full_attention"] * 2)
    assert "multiple of num_key_value_heads 8" in refused(tmp_path, "Mistral", num_key_value_heads=ABSENT)
    assert "layer_types must name 2 layers" in refused(tmp_path, "Qwen2", layer_types=["full_attention"])
    assert "layer_types" in refused(tmp_path, "Qwen2", layer_types=3)
    assert "max_window_layers" in refused(tmp_path, "Qwen2", use_sliding_window=True, max_window_layers="x")
    both = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    assert "use_sliding_window is not true" in refused(tmp_path, "Qwen2", **both)
    assert "sliding_window" in refused(tmp_path, "Qwen2", use_sliding_window=True, **both | {"sliding_window": -1})
    assert "attention_bias" in refused(tmp_path, "Qwen3", attention_bias=True)


def test_windows(tmp_path: Path) -> None:
    assert read(tmp_path, "Mistral", sliding_window=8).windows == (8, 8)
    assert read(tmp_path, "Mistral", sliding_window=None).windows == (None, None)
    assert read(tmp_path, "Mistral").windows == (4096, 4096)
    assert read(tmp_path, "Qwen2", sliding_window=8).windows == (None, None)
    assert read(tmp_path, "Qwen2", sliding_window=8, use_sliding_window=True).windows == (None, None)  # from layer 28
    upper = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    assert read(tmp_path, "Qwen2", **upper).windows == (None, 8)
    kinds = ["sliding_attention", "full_attention"]  # stronger than max_window_layers
    assert read(tmp_path, "Qwen3", layer_types=kinds, **upper).windows == (8, None)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=ABSENT, rms_norm_eps=ABSENT)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope.theta) == (4, 4, 1e-6, 10000.0)
    assert read(tmp_path, "Qwen3").head_dim == 128
    assert read(tmp_path, "Mistral", num_attention_heads=8, num_key_value_heads=ABSENT).num_kv_heads == 8


def test_old_and_new_names_mean_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="bfloat16")
    new = read(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 5e5}, torch_dtype=ABSENT, dtype="bfloat16")
    assert old == new and hash(old) == hash(new)
    assert old.rope.kind == "llama3" and old.dtype == "bfloat16"
    older = read(tmp_path, rope_scaling={"type": "linear", "factor": 2})
    assert older.rope == read(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0}).rope


def test_what_is_switched_off_or_harmless_passes(tmp_path: Path) -> None:
    plain = read(tmp_path)
    off = {"attention_bias": False, "logit_scale": None, "quantization_config": {}, "partial_rotary_factor": 1.0}
    assert read(tmp_path, **off, pad_token_id=-1, auto_map={"AutoTokenizer": "x.Y"}, use_cache=True) == plain


def test_eos_ids_are_united(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == {2, 3, 4}
    assert read(tmp_path).eos_token_ids == {3, 4}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff{}", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load_config(tmp_path)


KEYS = (
    *BASE,
    *"head_dim rope_theta rope_scaling rope_parameters sliding_window layer_types max_window_layers dtype".split(),
    *"use_sliding_window tie_word_embeddings eos_token_id bos_token_id attention_bias auto_map".split(),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.sampled_from(["x", "linear", "llama3", "type"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(["Gemma2", "Gemma3", "Llama", "Mistral", "Qwen2", "Qwen3"]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
)
def test_any_json_gives_a_sound_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, family: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    try:
        config = read(folder, family, **changes)
    except ConfigError:
        return
    assert config.num_heads == config.num_kv_heads * config.group
    assert config.head_dim % 2 == 0 and config.head_dim > 0
    assert len(config.windows) == config.num_layers
    assert all(window is None or window > 0 for window in config.windows)
    assert 0 < config.norm_eps < float("inf") and config.rope.theta > 0 and config.rope.factor > 0
    hash(config)


def test_experts(tmp_path: Path) -> None:
    plain = read(tmp_path, "Mixtral")
    assert plain.experts is not None and plain.expert_size == plain.intermediate_size
    assert (plain.experts.count, plain.experts.per_token, plain.experts.renormalise) == (8, 2, True)
    assert plain.experts.layers == frozenset(range(plain.num_layers))
    some = read(
        tmp_path, "Qwen3Moe", mlp_only_layers=[0], moe_intermediate_size=24, num_experts=4, num_experts_per_tok=1
    )
    assert some.experts is not None and some.expert_size == 24
    assert some.experts.layers == {1} and not some.experts.renormalise
    assert read(tmp_path, "Qwen3Moe", decoder_sparse_step=3).experts is None, "no layer is the third"
    assert "5 experts" in refused(tmp_path, "Mixtral", num_experts_per_tok=5, num_local_experts=4)
    assert "mlp_only_layers" in refused(tmp_path, "Qwen3Moe", mlp_only_layers=[7])
    assert "differ" in refused(tmp_path, "Qwen3Moe", num_experts=4, num_local_experts=6)


def test_quantized(tmp_path: Path) -> None:
    whole = read(
        tmp_path, quantization_config=rounded() | {"ignore": ["lm_head"], "sparsity_config": {"format": "dense"}}
    )
    assert whole.quantized is not None and whole.stored == whole
    assert (whole.quantized.kind, whole.quantized.dtype, whole.quantized.stored) == ("int8", "int8", True)
    small = read(tmp_path, quantization_config=rounded(type="float"))
    assert small.quantized is not None and small.quantized.dtype == "float8_e4m3fn"
    assert small.round_weights("fp8") == small
    with pytest.raises(ConfigError, match="weights are fp8 already, and cannot become int8"):
        small.round_weights("int8")
    plain = read(tmp_path)
    assert plain.round_weights("int8").stored == plain != plain.round_weights("int8")


def test_gemma(tmp_path: Path) -> None:
    two = read(tmp_path, "Gemma2", hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
    assert two.windows == (4096, None) and (two.attention_soft_cap, two.logit_soft_cap) == (50, 30)
    assert two.tied_embeddings and two.head_dim == 256 and two.activation == "gelu_tanh" and two.local_rope is None
    assert two.rule(0).scale == 1 / 16 and two.rule(1).soft_cap == 50
    assert read(tmp_path, "Gemma2", final_logit_softcapping=None).logit_soft_cap is None
    many = {"num_hidden_layers": 7, "sliding_window": 512}
    three = read(tmp_path, "Gemma3", rope_local_base_freq=1e3, sliding_window_pattern=3, **many)
    assert three.windows == (512, 512, None, 512, 512, None, 512) and three.attention_soft_cap is None
    assert three.local_rope is not None and (three.rope.theta, three.local_rope.theta) == (1e6, 1e3)
    assert read(tmp_path, "Gemma3", **many).windows == (512,) * 5 + (None, 512)
    scaled = read(tmp_path, "Gemma3", rope_scaling={"rope_type": "linear", "factor": 8})
    assert scaled.local_rope is not None and (scaled.rope.factor, scaled.local_rope.factor) == (8, 1)
    assert "use_bidirectional" in refused(tmp_path, "Gemma3", use_bidirectional_attention=True)
    assert "attn_logit_softcapping" in refused(tmp_path, "Gemma2", attn_logit_softcapping=0)
    assert "rope_parameters must have" in refused(tmp_path, "Gemma3", rope_parameters={"rope_type": "default"})


def test_phi3(tmp_path: Path) -> None:
    assert read(tmp_path, "Phi3").fused_tensors and read(tmp_path, "Phi3").windows == (None, None)
    assert read(tmp_path, "Phi3", sliding_window=9).windows == (9, 9)
    longrope = {"type": "su", "short_factor": [1.0, 1], "long_factor": [2.0, 3]}
    given = {"rope_scaling": longrope, "original_max_position_embeddings": 16}
    rope = read(tmp_path, "Phi3", **given).rope
    assert (rope.kind, rope.factors, rope.short_factors, rope.original_max_len) == ("longrope", (2, 3), (1, 1), 16)
    assert "long_factor has 2 numbers, not 1" in refused(tmp_path, "Phi3", **given, partial_rotary_factor=0.5)
    assert "short_factor must be a list" in refused(
        tmp_path, "Phi3", **given | {"rope_scaling": longrope | {"short_factor": 1}}
    )
    assert "original_max_position_embeddings must be" in refused(tmp_path, "Phi3", rope_scaling=longrope)
    assert read(tmp_path, "Phi3", original_max_position_embeddings=4096).rope.kind == "default"
