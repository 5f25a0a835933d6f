"""Weights in 8 bits: near the unrounded model, exactly the model of the rounded weights, and read back as they were."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from engine_driver import Driver
from oracle import model_mesh, naive_generate, naive_logits

from jmemserve.config import LoadFormat, Quantization, Warmup
from jmemserve.convert import convert
from jmemserve.errors import CheckpointError
from jmemserve.models import ModelConfig, load_config, weights
from jmemserve.models.describe import describe
from jmemserve.models.export import save_safetensors
from jmemserve.models.quantized import Quantized
from jmemserve.types import SamplingParams

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = [5, 77, 31, 9, 120, 64, 3, 18, 90, 41, 12, 7]
TYPES = {"int8": "int", "fp8": "float"}
NEAR = {"int8": 0.04, "fp8": 0.2}  # root mean squares, of the error over that of the logits


def loaded(folder: Path, kind: str | None = None, size: int = 1, dtype: str = "float32"):
    config = load_config(folder)
    if kind is not None:
        config = config.round_weights(kind)
    return config, weights.load(folder, LoadFormat.AUTO, config, dtype, model_mesh(size), 0, lambda done, total: None)


def unrounded(config: ModelConfig, arrays: dict) -> weights.Model:
    """The float model that has exactly the rounded weights."""

    def make(path: str, weight, sharding):
        if f"{path}_scale" not in arrays:
            return jnp.array(arrays[path])
        scale = np.asarray(arrays[f"{path}_scale"])
        values = np.asarray(arrays[path]).astype(np.float32)
        return jnp.asarray(values * scale.reshape(scale.shape[:-1] + (1,) * weight.inputs))

    return weights.build(config.stored, "float32", model_mesh(1), make, lambda done, total: None)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama3", "phi3", "qwen3_moe", "gemma2"])
def test_it_is_the_model_of_the_rounded_weights(name: str, kind: str) -> None:
    config, model = loaded(FIXTURES / name, kind)
    arrays = weights.flat(model[1])
    assert arrays["layers.1.qkv"].dtype == config.quantized.dtype and arrays["embed"].dtype == np.float32
    logits = naive_logits(*model, PROMPT)
    exact = naive_logits(*unrounded(config, arrays), PROMPT)
    assert np.abs(logits - exact).max() < 1e-4 * np.abs(exact).max()
    _, plain = loaded(FIXTURES / name)
    wanted = naive_logits(*plain, PROMPT)
    assert 0 < np.linalg.norm(logits - wanted) < NEAR[kind] * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_two_devices_round_alike(kind: str) -> None:
    """A row that is divided has its largest value on one of the devices."""
    _, (_, one) = loaded(FIXTURES / "qwen3_moe", kind)
    config, two = loaded(FIXTURES / "qwen3_moe", kind, size=2)
    ones = weights.flat(one)
    for path, array in weights.flat(two[1]).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(ones[path]), err_msg=path)
    assert sum(array.nbytes for array in ones.values()) == weights.num_bytes(config, "float32")
    assert weights.num_bytes(config, "float32") < 0.6 * weights.num_bytes(config.stored, "float32")


def stored(tmp_path: Path, name: str, kind: str, **changes: np.ndarray) -> Path:
    """A checkpoint in the form of compressed-tensors."""
    config, (_, state) = loaded(FIXTURES / name, kind)
    folder = tmp_path / "stored"
    folder.mkdir()
    save_safetensors(folder, describe(config), weights.flat(state) | changes, lambda size: None)
    scheme = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": TYPES[kind]}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    given = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": given}))
    return folder


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["phi3", "qwen3_moe"])
def test_a_checkpoint_of_rounded_weights_is_read_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    folder = stored(tmp_path, name, kind)
    config, model = loaded(folder)
    assert config.quantized == Quantized(kind, stored=True)
    wanted = weights.flat(loaded(FIXTURES / name, kind)[1][1])
    convert(folder, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    for again in (model, loaded(folder, size=2)[1], loaded(tmp_path / "orbax")[1], loaded(tmp_path / "back")[1]):
        found = weights.flat(again[1])
        assert found.keys() == wanted.keys()
        for path, array in found.items():
            assert array.dtype == wanted[path].dtype, path
            np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted[path]), err_msg=path)


def test_float_tensors_are_not_taken_for_rounded_ones(tmp_path: Path) -> None:
    config, (_, state) = loaded(FIXTURES / "llama3", "int8")
    path = "layers.0.down"
    floats = {path: np.asarray(weights.flat(state)[path]).astype(np.float32)}
    with pytest.raises(CheckpointError, match="down_proj.weight' has type F32, not one of I8"):
        loaded(stored(tmp_path, "llama3", "int8", **floats))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_no_rounding_makes_are_refused(tmp_path: Path, broken: float) -> None:
    config, (_, state) = loaded(FIXTURES / "llama3", "fp8")
    path = "layers.1.qkv_scale"
    scales = np.array(weights.flat(state)[path])
    scales[0, 1, 3] = broken
    with pytest.raises(CheckpointError, match="layers.1.self_attn.q_proj.weight_scale.*no number above 0"):
        loaded(stored(tmp_path, "llama3", "fp8", **{path: scales}))


def test_dummy_weights_of_a_rounded_checkpoint_are_rounded(tmp_path: Path) -> None:
    config = load_config(stored(tmp_path, "llama3", "int8"))
    _, state = weights.load(tmp_path, LoadFormat.DUMMY, config, "bfloat16", model_mesh(1), 0, lambda done, total: None)
    arrays = weights.flat(state)
    assert np.abs(np.asarray(arrays["layers.0.out"])).max() == 127
    assert arrays["layers.0.out_scale"].dtype == np.float32 and arrays["embed"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("kind", "mesh"), [("int8", "prefill+decode"), ("fp8", "colocated"), ("int8", "colocated:2")])
def test_the_engine_makes_the_same_tokens(kind: str, mesh: str) -> None:
    config, model = loaded(FIXTURES / "llama3", kind)
    prompts = [PROMPT, PROMPT[::-1], PROMPT * 3]
    wanted = [naive_generate(*model, config, prompt, 12) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=12)
    given = {"load_format": LoadFormat.AUTO, "warmup": Warmup.FAST, "quantization": Quantization(kind)}
    with Driver(FIXTURES / "llama3", mesh, **given) as driver:
        assert driver.generate(prompts, params) == wanted
