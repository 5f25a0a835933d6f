"""python -m jmemserve.convert: there and back without the loss of a bit, and never over anything."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import model_mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jmemserve.config import LoadFormat, demo_folder
from jmemserve.convert import main
from jmemserve.models import load_config, weights
from jmemserve.models.describe import describe
from jmemserve.models.export import save_safetensors

FIXTURES = Path(__file__).parent / "fixtures"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape, ours[name].tobytes())
        == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
        for name in ours
    )


def arrays(folder: Path, dtype: str = "float32") -> dict[str, jax.Array]:
    config = load_config(folder)
    _, state = weights.load(folder, LoadFormat.AUTO, config, dtype, model_mesh(), 0, lambda done, total: None)
    return weights.flat(state)


@pytest.mark.parametrize("source", [*(FIXTURES / name for name in ("llama2", "phi3", "qwen2", "qwen3")), demo_folder()])
def test_there_and_back_is_bit_exact(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "new" / "orbax", tmp_path / "hf"
    assert main([str(source), str(there)]) == 0
    assert "MB of weights as orbax in" in capsys.readouterr().out
    assert not list(there.glob("*.safetensors")) and (there / "orbax").is_dir()
    assert main([str(there), str(back), "--to", "hf"]) == 0
    said = capsys.readouterr()
    assert "MB of weights as hf in" in said.out and "read" in said.err and "write" in said.err
    assert same(tensors(back), tensors(source))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (there / name).exists() == (back / name).exists() == (source / name).exists()
        if (source / name).exists():
            assert (back / name).read_bytes() == (source / name).read_bytes()
    with safe_open(back / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert (back / "model.safetensors").stat().st_mode == (back / "config.json").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"new", "hf"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_said_in_config_json(tmp_path: Path, dtype: str) -> None:
    source, there = FIXTURES / "llama3", tmp_path / "there"
    assert main([str(source), str(there), "--dtype", dtype]) == 0
    assert load_config(there).dtype == dtype
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, there))
    assert after == before | {"dtype": dtype}
    assert main([str(there), str(tmp_path / "back"), "--to", "hf"]) == 0  # auto: what is stored
    wanted = {name: tensor.astype(dtype) for name, tensor in tensors(source).items()}
    assert same(tensors(tmp_path / "back"), wanted)


def test_auto_holds_mixed_types_exactly_whatever_config_json_says(tmp_path: Path) -> None:
    source = Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "source"))
    mixed = tensors(source)
    mixed |= {name: tensor.astype("bfloat16") for name, tensor in mixed.items() if "norm" not in name}
    save_file(mixed, source / "model.safetensors")
    (source / "config.json").write_text((source / "config.json").read_text().replace("float32", "bfloat16"))
    assert main([str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    wanted = {name: tensor.astype(np.float32) for name, tensor in mixed.items()}
    assert same(tensors(tmp_path / "hf"), wanted)
    assert load_config(tmp_path / "hf").dtype == "float32"


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    source = FIXTURES / "qwen2"
    config, heard = load_config(source), []
    save_safetensors(tmp_path, describe(config), arrays(source), heard.append, max_file_bytes=60_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / file).stat().st_size < 64_000 for file in files)
    assert len(heard) == len(files) and sum(heard) == weights.num_bytes(config, "float32")
    shutil.copy(source / "config.json", tmp_path)
    assert same(tensors(tmp_path), tensors(source))
    loaded, wanted = arrays(tmp_path), arrays(source)
    assert all(np.array_equal(loaded[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("kind", ["file", "folder", "full folder"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "full folder":
        (target / "config.json").write_text("mine")
    assert main([str(FIXTURES / "llama3"), str(target)]) == 2
    assert "is there already, and is never overwritten" in capsys.readouterr().err
    if kind == "file":
        assert target.read_text() == "mine"
    if kind == "full folder":
        assert [path.read_text() for path in target.iterdir()] == ["mine"]


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "source"))
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert main([str(source), str(tmp_path / "target")]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A parent that is a file: the folder cannot be made."""
    (tmp_path / "file").write_text("mine")
    assert main([str(FIXTURES / "llama3"), str(tmp_path / "file" / "target")]) == 2
    assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_arguments_that_mean_nothing(tmp_path: Path) -> None:
    for wrong in (["--to", "gguf"], ["--dtype", "int8"], []):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), *([str(tmp_path / "x")] if wrong else []), *wrong])
        assert caught.value.code == 2
