"""Facts about the repository as a whole: sizes, docstrings, the interface file, the demo checkpoint."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from jmemserve.server.flags import parse_flags

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jmemserve"
MAX_LINES = 400
DEMO_BYTES = 6 << 20
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))


def test_every_line_of_the_interface_is_explained() -> None:
    """In the .proto each message, enum, field, value and rpc has a comment right above it; numbers are optional."""
    lines = (PACKAGE / "server" / "jmemserve.proto").read_text().splitlines()
    numbers = re.compile(r"\s*(u?int32|u?int64|float|double|bool) ")
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("package ")) :]
    for before, line in zip(body, body[1:], strict=False):
        if re.match(r"\s*(message|enum|service|rpc|oneof|[\w. ]+ = \d+;)", line.split("//")[0]):
            assert before.strip().startswith("//"), line
        assert not numbers.match(line), f"write optional: {line.strip()}"


def test_demo_checkpoint_is_small_and_complete() -> None:
    folder = PACKAGE / "demo"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= DEMO_BYTES
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert "add_generation_prompt" in template


def test_readme_lists_every_flag_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    offered = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out)) - {"--help"}
    section = (ROOT / "README.md").read_text().split("### Flags")[1].split("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(--[a-z-]+)`", section)) == offered


def test_scripts_are_executable_and_parse() -> None:
    for name, shell in (("tools/find-python", "sh"), (".ci/run", "bash")):
        assert (ROOT / name).stat().st_mode & 0o111, name
        subprocess.run([shell, "-n", str(ROOT / name)], check=True, timeout=10)


def test_find_python_refuses_what_cannot_be_used(tmp_path: Path) -> None:
    """A PYTHON= that is too old, or does not run, is refused in words and nothing else is taken in its place."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 'it is Python 3.8, and 3.12 or newer is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    run = subprocess.run(
        [ROOT / "tools" / "find-python"],
        env={"PYTHON": str(old), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "3.12 or newer" in run.stderr and f"PYTHON={old}" in run.stderr
