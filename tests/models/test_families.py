"""Every family against transformers: logits, greedy tokens, one device and two, and through the whole engine.

The fixtures are made by make_fixtures.py; only numpy is needed to read them.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from engine_driver import Driver
from oracle import model_mesh, naive_generate, naive_logits
from safetensors.numpy import load_file, save_file

from jmemserve.config import EngineConfig, LoadFormat, Warmup
from jmemserve.engine.build import resolve_dtype
from jmemserve.errors import CheckpointError, ConfigError
from jmemserve.models import ModelConfig, load_config, weights
from jmemserve.types import SamplingParams

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = (
    "gemma2",
    "gemma3",
    "llama2",
    "llama3",
    "llama_linear",
    "mistral",
    "mixtral",
    "phi3",
    "phi3_long",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
)
PROMPTS = 3
LONGEST = 128  # tokens that an engine allows
MESHES = {
    "gemma2": "colocated:2",
    "gemma3": "prefill+decode",
    "llama3": "colocated",
    "mistral": "prefill+decode",
    "mixtral": "colocated",
    "phi3": "colocated:2",
    "phi3_long": "prefill+decode",
    "qwen2_window": "colocated:2",
    "qwen3": "prefill+decode",
    "qwen3_moe": "prefill+decode:2",
}


@functools.cache
def loaded(name: str, size: int, dtype: str = "float32") -> tuple[ModelConfig, weights.Model]:
    config = load_config(FIXTURES / name).for_lengths(LONGEST)
    folder = FIXTURES / name
    return config, weights.load(folder, LoadFormat.AUTO, config, dtype, model_mesh(size), 0, lambda done, total: None)


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "reference.npz") as arrays:
        return dict(arrays)


def prompts(name: str) -> list[list[int]]:
    return [reference(name)[f"prompt{number}"].tolist() for number in range(PROMPTS)]


def greedy(name: str) -> list[list[int]]:
    return [reference(name)[f"greedy{number}"].tolist() for number in range(PROMPTS)]


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, size: int) -> None:
    _, model = loaded(name, size)
    for number, prompt in enumerate(prompts(name)):
        assert error(naive_logits(*model, prompt), reference(name)[f"logits{number}"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_two_devices_hold_half_each(name: str) -> None:
    config, (_, state) = loaded(name, 2)
    arrays = weights.flat(state)
    inner = {"layers.0.gate_up", "layers.1.down", "layers.1.experts_gate_up", "layers.1.experts_down"} & set(arrays)
    for path in ("embed", "layers.0.qkv", "layers.1.out", *inner):
        assert [shard.data.nbytes * 2 for shard in arrays[path].addressable_shards] == [arrays[path].nbytes] * 2, path
    assert arrays["norm"].is_fully_replicated
    assert ("lm_head" in arrays) is not config.tied_embeddings
    assert sum(array.nbytes for array in arrays.values()) == weights.num_bytes(config, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuations_are_those_of_transformers(name: str) -> None:
    config, model = loaded(name, 1)
    for prompt, wanted in zip(prompts(name), greedy(name), strict=True):
        assert naive_generate(*model, config, prompt, len(wanted)) == wanted


@pytest.mark.parametrize("name", MESHES)
def test_the_engine_makes_the_same_tokens(name: str) -> None:
    """All prompts at once, so that they share steps, with blocks of 4 tokens and prompts in several chunks."""
    params = SamplingParams(temperature=0, max_tokens=len(greedy(name)[0]))
    given = {"load_format": LoadFormat.AUTO, "warmup": Warmup.FAST, "max_model_len": LONGEST}
    with Driver(FIXTURES / name, MESHES[name], **given) as driver:
        assert driver.generate(prompts(name), params) == greedy(name)


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.1), ("float16", 0.015)])
@pytest.mark.parametrize("name", ["mistral", "phi3", "qwen2", "qwen3"])
def test_types_of_two_bytes_are_near(name: str, dtype: str, near: float) -> None:
    _, model = loaded(name, 1, dtype)
    assert {array.dtype.name for array in weights.flat(model[1]).values()} == {dtype}
    assert error(naive_logits(*model, prompts(name)[1]), reference(name)["logits1"]) < near


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_float16_through_the_engine(name: str) -> None:
    """Three more bits than bfloat16 has: at what is clear, the tokens are those of float32."""
    params = SamplingParams(temperature=0, max_tokens=len(greedy(name)[0]))
    given = {"load_format": LoadFormat.AUTO, "warmup": Warmup.FAST, "max_model_len": LONGEST, "dtype": "float16"}
    with Driver(FIXTURES / name, "prefill+decode", **given) as driver:
        assert driver.generate(prompts(name), params) == greedy(name)


def test_float16_is_refused_where_numbers_do_not_fit(tmp_path: Path) -> None:
    for name in ("gemma2", "gemma3"):
        with pytest.raises(ConfigError, match=f"--dtype float16: a {name} model computes numbers above"):
            resolve_dtype(EngineConfig(model=str(FIXTURES / name), dtype="float16"), load_config(FIXTURES / name))
    tensors = load_file(FIXTURES / "qwen2" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors")
    config = load_config(FIXTURES / "qwen2")
    with pytest.raises(CheckpointError, match="some of 'layers.1.down' is above float16's largest"):
        weights.load(tmp_path, LoadFormat.AUTO, config, "float16", model_mesh(1), 0, lambda done, total: None)


def test_a_model_for_text_is_taken_from_among_others(tmp_path: Path) -> None:
    """A checkpoint of Gemma 3 that can see: the language model is one of several, in config.json as in the tensors."""
    text = json.loads((FIXTURES / "gemma3" / "config.json").read_text())
    del text["architectures"], text["eos_token_id"]
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [2],
        "vision_config": {"hidden_size": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    tensors = load_file(FIXTURES / "gemma3" / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors | {"vision_tower.head.probe": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    config = load_config(tmp_path)
    assert dataclasses.replace(config, tensor_prefix="") == load_config(FIXTURES / "gemma3")
    model = weights.load(tmp_path, LoadFormat.AUTO, config, "float32", model_mesh(1), 0, lambda done, total: None)
    assert error(naive_logits(*model, prompts("gemma3")[1]), reference("gemma3")["logits1"]) < 1e-4


def test_every_feature_of_the_fixtures_is_on() -> None:
    """What a fixture is for can be seen in its config, so a fixture that lost it would be noticed."""
    configs = {name: load_config(FIXTURES / name) for name in NAMES}
    assert configs["llama2"].group == 1 and not configs["llama2"].tied_embeddings
    assert configs["llama3"].rope.kind == "llama3" and configs["llama3"].group == 2
    assert configs["llama3"].num_heads * configs["llama3"].head_dim != configs["llama3"].hidden_size
    assert configs["llama_linear"].rope.kind == "linear" and configs["llama_linear"].rope.factor == 4
    assert configs["mistral"].windows == (8, 8)
    assert configs["qwen2"].attention_bias and configs["qwen2"].windows == (None, None)
    assert configs["qwen2_window"].windows == (None, 8)
    assert configs["qwen3"].qk_norm and configs["qwen3"].tied_embeddings
    gemma2, gemma3 = configs["gemma2"], configs["gemma3"]
    assert (
        gemma2.windows == gemma3.windows == (8, None) and gemma2.attention_scale == gemma3.attention_scale == 20**-0.5
    )
    assert gemma2.attention_soft_cap == 5 and gemma2.logit_soft_cap == 30 and gemma3.attention_soft_cap is None
    assert gemma3.rope.factor == 8 and gemma3.local_rope is not None and gemma3.local_rope.theta == 1e4
    assert (FIXTURES / "qwen3" / "model.safetensors.index.json").is_file()
    assert all(config.eos_token_ids == {2} and config.bos_token_id == 1 for config in configs.values())
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*")) < 300_000 * len(NAMES)


def test_rope_frequencies_do_not_depend_on_the_device() -> None:
    """Far into a long context the angle is frequency times position: an error of the last bit would show."""
    rope = load_config(FIXTURES / "llama3").rope
    exact = rope.theta ** (-np.arange(0, 64, 2, dtype=np.float64) / 64)
    found = rope.frequencies(64)
    assert found.dtype == np.float32
    assert found[0] == 1 and found[-1] == np.float32(exact[-1] / rope.factor)
    assert (found <= exact.astype(np.float32)).all()


def test_longrope_takes_its_factors_by_the_longest_sequence_allowed() -> None:
    long = load_config(FIXTURES / "phi3_long")
    assert long.rope.share == 0.5 and long.rope.amplitude == pytest.approx((1 + np.log(2) / np.log(128)) ** 0.5)
    plain = 10000.0 ** -(np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(long.rope.frequencies(12), plain / [1.5, 4, 16], rtol=1e-6)
    np.testing.assert_allclose(long.for_lengths(128).rope.frequencies(12), plain / [1, 1.25, 2], rtol=1e-6)
    assert long.for_lengths(129) == long == load_config(FIXTURES / "phi3_long")


def test_a_mesh_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 kv_heads, which do not divide evenly over model=4"):
        loaded("qwen3", 4)
