"""The benchmark of the cost model runs: small sizes, one device and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from engine_driver import tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quick_run_predicts_every_prompt(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", max_position_embeddings=1024)
    command = [sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), "--quick", "--config", str(folder)]
    command += ["--compilation-cache-dir", str(jax.config.jax_compilation_cache_dir)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "quick.json"), "--plot", str(tmp_path / "quick.png")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "quick.json").read_text())
    assert {(row["devices"], row["share"]) for row in result["rows"]} == {
        (d, s) for d in (1, 2) for s in (0, 25, 50, 75)
    }
    assert all(row[kind] > 0 for row in result["rows"] for kind in ("measured_s", "op", "op, scaled"))
    assert len(result["errors"]) == 10 and len(result["verdicts"]) == 6
    assert (tmp_path / "quick.png").stat().st_size > 10_000
