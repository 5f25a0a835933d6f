"""The benchmarks of routing policies, of stale trees and of the simulator run: small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, tmp_path: Path, *flags: str) -> list[dict]:
    """The rows of a quick run; it has drawn a picture too."""
    output, plot = tmp_path / "quick.json", tmp_path / "quick.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *flags, "--output", output, "--plot", plot],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert plot.stat().st_size > 10_000
    return json.loads(output.read_text())["rows"]


def test_events_are_not_further_from_the_truth_than_responses(tmp_path: Path) -> None:
    rows = run("staleness.py", tmp_path)
    assert {row["trees"] for row in rows} == {"events", "responses"}
    assert all(row["requests"] == rows[0]["requests"] > 20 and row["hit_rate"] > 0.5 for row in rows)


def test_simulated_policies(tmp_path: Path) -> None:
    rows = run("policies.py", tmp_path, "--part", "simulated")
    hits = {row["policy"]: row["hit_rate"] for row in rows}
    assert hits["cost"] > hits["round_robin"] > 0


@pytest.mark.slow
def test_real_policies(tmp_path: Path) -> None:
    cache = str(jax.config.jax_compilation_cache_dir)
    rows = run("policies.py", tmp_path, "--part", "real", "--compilation-cache-dir", cache)
    hits = {row["policy"]: row["hit_rate"] for row in rows}
    assert hits["cost"] >= hits["round_robin"] > 0


@pytest.mark.slow
def test_the_simulator_beside_real_servers(tmp_path: Path) -> None:
    cache = str(jax.config.jax_compilation_cache_dir)
    rows = run("simulate.py", tmp_path, "--compilation-cache-dir", cache)
    assert len({row["mesh"] for row in rows}) == 3 and len(rows) == 9
    assert all(row["measured_p50"] > 0 and row["simulated_p50"] > 0 for row in rows)
