"""Loading: every broken checkpoint is refused in words, and what is loaded does not depend on the mesh."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from oracle import model_mesh
from safetensors.numpy import load_file, save_file

from jmemserve.config import LoadFormat
from jmemserve.errors import CheckpointError, ConfigError
from jmemserve.models import load_config, weights
from jmemserve.models.describe import describe
from jmemserve.models.orbax_io import save_orbax

FIXTURES = Path(__file__).parent / "fixtures"
QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]


def fixture(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, folder / name))


def load(
    folder: Path, form: LoadFormat = LoadFormat.AUTO, size: int = 1, dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray]:
    """Every weight by path, after a look at what was said of the progress."""
    config, heard = load_config(folder), []
    _, state = weights.load(
        folder, form, config, dtype, model_mesh(size), seed, lambda done, total: heard.append((done, total))
    )
    total = weights.num_bytes(config, dtype)
    assert heard[-1] == (total, total) and heard == sorted(heard) and len(heard) == len(describe(config))
    return {path: np.asarray(array) for path, array in weights.flat(state).items()}


def refused(folder: Path, form: LoadFormat = LoadFormat.AUTO) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, form)
    return str(caught.value)


def edited(folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    """The fixture llama3 with other tensors."""
    copy = fixture("llama3", folder)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


def indexed(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The fixture qwen3, which is in several files, with another index."""
    copy = fixture("qwen3", folder)
    index = json.loads((copy / INDEX).read_text())
    edit(index)
    (copy / INDEX).write_text(json.dumps(index))
    return copy


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[path].dtype == theirs[path].dtype and ours[path].tobytes() == theirs[path].tobytes() for path in ours
    )


# Broken and foreign files


def test_a_missing_tensor(tmp_path: Path) -> None:
    sentence = refused(edited(tmp_path, lambda tensors: tensors.pop(QUERY)))
    assert f"lacks the tensor {QUERY!r} of shape [128, 48]" in sentence


def test_a_tensor_too_many(tmp_path: Path) -> None:
    copy = edited(tmp_path, lambda tensors: tensors.update({"model.layers.9.x": np.zeros(3, np.float32)}))
    assert "model.safetensors: tensor 'model.layers.9.x' has no place" in refused(copy)


def test_a_wrong_shape(tmp_path: Path) -> None:
    copy = edited(tmp_path, lambda tensors: tensors.update({QUERY: tensors[QUERY][:-1]}))
    sentence = refused(copy)
    assert f"model.safetensors: tensor {QUERY!r} has shape [127, 48], but config.json makes it [128, 48]" in sentence


def test_a_transposed_tensor(tmp_path: Path) -> None:
    copy = edited(tmp_path, lambda tensors: tensors.update({QUERY: np.ascontiguousarray(tensors[QUERY].T)}))
    assert "has shape [48, 128]" in refused(copy)


def test_a_type_that_no_checkpoint_has(tmp_path: Path) -> None:
    copy = edited(tmp_path, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.float64)}))
    assert f"tensor {QUERY!r} has type F64, not one of F32, BF16, F16" in refused(copy)


@pytest.mark.parametrize("keep", [0, 4, 300, -7])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    copy = fixture("llama3", tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole safetensors file" in refused(copy)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    copy = fixture("llama3", tmp_path)
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for form in (LoadFormat.AUTO, LoadFormat.SAFETENSORS):
        assert "pytorch_model.bin is a pickle, which is never read" in refused(copy, form)


def test_no_weights_at_all(tmp_path: Path) -> None:
    copy = fixture("llama3", tmp_path)
    (copy / "model.safetensors").unlink()
    assert "has no safetensors file, nor an orbax folder" in refused(copy)
    assert "has no orbax folder" in refused(copy, LoadFormat.ORBAX)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../llama3/model.safetensors", "names the file '../llama3/model.safetensors'; only"),
        ("/etc/passwd", "names the file '/etc/passwd'; only"),
        ("..", "names the file '..'; only"),
        ("config.json", "names the file 'config.json'; only"),
        ("other.safetensors", "names the file 'other.safetensors', which is not there"),
        (["a"], "must be a name, not ['a']"),
        ("model-00003-of-00003.safetensors", "lacks the tensor 'model.embed_tokens.weight' that"),
    ],
)
def test_an_index_that_names_a_wrong_file(tmp_path: Path, file: object, words: str) -> None:
    fixture("llama3", tmp_path)
    copy = indexed(tmp_path, lambda index: index["weight_map"].update({"model.embed_tokens.weight": file}))
    assert words in refused(copy)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    copy = indexed(tmp_path, lambda index: index["weight_map"].pop("model.embed_tokens.weight"))
    assert "lacks the tensor 'model.embed_tokens.weight' of shape" in refused(copy)
    wrong = {"{": "cannot be read as JSON", "[]": "JSON object", '{"weight_map": {}}': "no weight_map"}
    for text, words in wrong.items():
        (copy / INDEX).write_text(text)
        assert words in refused(copy)


def test_a_lost_index_is_not_needed_but_doubles_are_refused(tmp_path: Path) -> None:
    copy = fixture("qwen3", tmp_path)
    whole = load(copy)
    (copy / INDEX).unlink()
    assert same(load(copy), whole)
    shutil.copy(copy / "model-00001-of-00003.safetensors", copy / "more.safetensors")
    assert "both hold the tensor" in refused(copy)


def test_model_safetensors_is_stronger_than_what_lies_beside_it(tmp_path: Path) -> None:
    copy = fixture("llama3", tmp_path)
    save_file({"tok_embeddings.weight": np.zeros((2, 2), np.float32)}, copy / "consolidated.safetensors")
    assert same(load(copy), load(FIXTURES / "llama3"))


def test_tensors_that_follow_from_others_are_passed_over(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(16, np.float32)

    assert same(load(edited(tmp_path, add)), load(FIXTURES / "llama3"))


# What is loaded


@pytest.mark.parametrize("name", ["llama2", "qwen2", "qwen3"])
def test_two_devices_get_what_one_gets(name: str) -> None:
    assert same(load(FIXTURES / name, size=2), load(FIXTURES / name))


def test_types_are_cast(tmp_path: Path) -> None:
    full = load(FIXTURES / "llama3")
    half = edited(tmp_path, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    assert same(load(half), {path: array.astype(np.float16).astype(np.float32) for path, array in full.items()})
    cast = load(FIXTURES / "llama3", dtype="bfloat16")
    assert same(cast, {path: array.astype("bfloat16") for path, array in full.items()})


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    one, two = (load(FIXTURES / "qwen2", LoadFormat.DUMMY, size=size, seed=3) for size in (1, 2))
    assert same(one, two)
    other = load(FIXTURES / "qwen2", LoadFormat.DUMMY, seed=4)
    assert not np.array_equal(one["layers.0.qkv"], other["layers.0.qkv"])
    assert not np.array_equal(one["layers.0.qkv"], one["layers.1.qkv"])
    assert (one["norm"] == 1).all() and 0.015 < one["embed"].std() < 0.025


# Orbax


def saved(name: str, folder: Path, dtype: str = "float32") -> Path:
    """A model folder with config.json and Orbax weights only."""
    config = load_config(FIXTURES / name)
    _, state = weights.load(FIXTURES / name, LoadFormat.AUTO, config, dtype, model_mesh(2), 0, lambda done, total: None)
    shutil.copy(FIXTURES / name / "config.json", folder / "config.json")
    save_orbax(weights.flat(state), folder)
    return folder


@pytest.mark.parametrize(("name", "dtype"), [("llama3", "float32"), ("qwen2", "bfloat16")])
def test_orbax_gives_back_what_it_got(tmp_path: Path, name: str, dtype: str) -> None:
    folder = saved(name, tmp_path, dtype)
    wanted = load(FIXTURES / name, dtype=dtype)
    for size in (1, 2):
        assert same(load(folder, size=size, dtype=dtype), wanted)
    cast = load(folder, LoadFormat.ORBAX)
    assert same(cast, {path: array.astype(np.float32) for path, array in wanted.items()})


def test_orbax_is_not_overwritten(tmp_path: Path) -> None:
    folder = saved("llama3", tmp_path)
    with pytest.raises(ConfigError, match="is there already"):
        save_orbax({"x": jax.numpy.ones(2)}, folder)
    assert same(load(folder), load(FIXTURES / "llama3"))


def test_orbax_of_another_model(tmp_path: Path) -> None:
    folder = saved("llama3", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"intermediate_size": 98}, "'layers.0.down' is of shape [48, 64] in the checkpoint and of shape [48, 98] by"),
        ({"num_hidden_layers": 1}, "'layers.1.attention_norm' is of shape [48] in the checkpoint and absent by"),
        ({"num_hidden_layers": 3}, "'layers.2.attention_norm' is absent in the checkpoint and of shape [48] by"),
    ):
        (folder / "config.json").write_text(json.dumps(raw | change))
        assert words in refused(folder)


@pytest.mark.parametrize("lost", ["_METADATA", "manifest.ocdbt", "."])
def test_orbax_with_files_lost(tmp_path: Path, lost: str) -> None:
    folder = saved("llama3", tmp_path)
    if lost == ".":
        shutil.rmtree(folder / "orbax")
        (folder / "orbax").mkdir()
    else:
        (folder / "orbax" / lost).unlink()
    assert f"orbax is not a whole Orbax checkpoint: it lacks {lost if lost != '.' else '_METADATA'}" in refused(folder)


def test_orbax_with_broken_metadata(tmp_path: Path) -> None:
    folder = saved("llama3", tmp_path)
    (folder / "orbax" / "_METADATA").write_text("{")
    assert "orbax is not a whole Orbax checkpoint: its metadata cannot be read" in refused(folder)
