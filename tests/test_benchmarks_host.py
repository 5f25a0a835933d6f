"""The benchmark of the host's work per step runs, in small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quick_run_has_figures_for_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "host.py"), "--quick", "--output", str(tmp_path / "host.json")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = json.loads((tmp_path / "host.json").read_text())["tables"].values()
    assert [row["sequences"] for row in rows] == [1, 4]
    assert all(row[f"{part}_us"] > 0 for row in rows for part in ("plan", "arrays", "dispatch", "commit", "gap"))
