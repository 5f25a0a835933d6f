"""The table "Who may import whom" of ARCHITECTURE.md, held against every import in the package."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jmemserve"
GENERATED = ("_pb2.py", "_pb2_grpc.py")
JIT_FILES = {
    *("engine/selftest.py", "engine/runner.py", "kvpool/arena.py", "kvpool/store.py", "models/quantized.py"),
    # Within a compiled step: all layers share one kernel, which is traced once.
    "kernels/tpu/__init__.py",
    *(f"kernels/{gpu}/{part}.py" for gpu in ("mosaic_gpu", "mosaic_ampere") for part in ("decode", "prefill")),
}


def read_table(text: str) -> tuple[dict[str, tuple[set[str], set[str]]], dict[str, str]]:
    """From the section of ARCHITECTURE.md: part -> (parts, packages) it may import, and name -> part.

    A part is called by the first name in its row; the others are modules that belong to it.
    """
    section = text.split("## Who may import whom")[1].split("\n## ")[0]
    table, names = {}, {}
    for line in section.splitlines():
        if line.startswith("| `"):
            own, parts, packages = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
            table[own[0]] = (set(parts), set(packages))
            names |= {name: own[0] for name in own}
    return table, names


TABLE, PARTS = read_table((ROOT / "ARCHITECTURE.md").read_text())


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.endswith(GENERATED)]


def module_name(path: Path) -> str:
    """The dotted name inside the package: kvpool/store.py is kvpool.store, kvpool/__init__.py is kvpool."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def part_of(module: str) -> str | None:
    """The part of the longest name in the table that fits, or None."""
    while module not in PARTS and module:
        module = module.rpartition(".")[0]
    return PARTS.get(module)


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of what a file imports, wherever in the file the import stands."""
    package = ["jmemserve", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{origin}.{alias.name}".removeprefix("jmemserve.")
                yield f"jmemserve.{inner}" if origin.startswith("jmemserve") and is_module(inner) else origin


def violations(path: Path) -> Iterator[str]:
    part = part_of(module_name(path))
    where = path.relative_to(ROOT)
    if part is None:
        yield f"{where} belongs to no part of the table"
        return
    parts, packages = TABLE[part]
    for name in imports(path):
        top = name.split(".")[0]
        if top == "jmemserve":
            target = part_of(name.removeprefix("jmemserve").lstrip("."))
            if target is not None and target != part and target not in parts:
                yield f"{where} ({part}) imports {name}, but {part} may not import {target}"
        elif top not in sys.stdlib_module_names and top not in packages:
            yield f"{where} ({part}) imports {name}, but {part} may import only {sorted(packages)}"


@pytest.mark.parametrize(
    "path", [p for p in sources() if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_follow_the_table(path: Path) -> None:
    assert list(violations(path)) == []


def test_the_package_itself_imports_nothing_at_once() -> None:
    """``import jmemserve`` stays cheap: what it offers is imported when first asked for."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    eager = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in eager if "jmemserve" in line or "jax" in line or "grpc" in line] == []


def test_every_part_of_the_table_exists_and_names_parts() -> None:
    for name in PARTS:
        assert is_module(name), name
    for part, (parts, packages) in TABLE.items():
        assert parts <= set(TABLE), part
        assert not packages & sys.stdlib_module_names, part


def test_the_table_has_no_circle() -> None:
    """Ordered by what they import, no part reaches itself."""
    left = {part: {other for other in parts if other in TABLE} for part, (parts, _) in TABLE.items()}
    while left:
        free = [part for part, parts in left.items() if not parts & left.keys()]
        assert free, f"these parts import each other in a circle: {sorted(left)}"
        for part in free:
            del left[part]


def test_jit_is_written_in_few_files() -> None:
    """A compiled function has one home, so that nothing compiles behind the engine's back."""
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("jit", "pmap"):
                found.add(path.relative_to(PACKAGE).as_posix())
            if isinstance(node, ast.ImportFrom) and any(alias.name in ("jit", "pmap") for alias in node.names):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= JIT_FILES, sorted(found - JIT_FILES)


def test_the_walk_sees_what_it_must() -> None:
    """The checks are checked: a submodule imported by its package is found, and the longest part wins."""
    names = set(imports(PACKAGE / "engine" / "runner.py"))
    assert {"jax", "jmemserve.engine.sampling", "jmemserve.kvpool.store"} <= names
    assert part_of("kvpool.store") == "kvpool.store"
    assert part_of("kvpool.ledger") == "kvpool"
    assert part_of("unheard_of") is None


@pytest.mark.parametrize("module", ["jmemserve", "jmemserve.config", "jmemserve.kvpool", "jmemserve.client"])
def test_jax_is_not_loaded_where_it_is_not_needed(module: str) -> None:
    """The pure parts and the client start without JAX, through whatever they import."""
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
