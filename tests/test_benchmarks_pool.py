"""The benchmark of the pool runs: small sizes, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quick_run_has_figures_for_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "pool.py"), "--quick", "--repeats", "1"]
    command += ["--part", "api,index,transfer,swap,memory", "--transports", "local,staged-tcp"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path), "--output", "quick"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "quick.json").read_text())["parts"]
    assert set(parts) == {"api", "index", "transfer", "swap", "memory"}
    assert "staged-tcp, 2 processes" in parts["transfer"]["tables"], parts["transfer"]["remarks"]
    figures = [
        (name, column, value)
        for name, part in parts.items()
        for rows in part["tables"].values()
        for row in rows
        for column, value in row.items()
        if column.endswith(("_us", "_ms", "_gb_s"))
    ]
    assert len(figures) > 100
    assert all(value is None or value > 0 for _, _, value in figures), figures
    assert (tmp_path / "quick.png").stat().st_size > 10_000
