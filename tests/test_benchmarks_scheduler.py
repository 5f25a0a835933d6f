"""The benchmark of the scheduler runs, in small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quick_run_has_figures_for_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scheduler.py"), "--quick", "--part", "tree"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path), "--output", "quick"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "quick.json").read_text())["parts"]
    assert set(parts) == {"tree"}
    tables = parts["tree"]["tables"]
    assert [row["holders"] for row in tables["a match"]] == [4, 64]
    kinds = {"prompts", "decode", "eviction", "eviction of runs", "snapshot", "leaving"}
    assert {row["events"] for row in tables["events, in blocks per second of CPU"]} == kinds
    values = [value for rows in tables.values() for row in rows for value in row.values()]
    assert all(value is None or isinstance(value, str) or value > 0 for value in values), values
