"""The benchmark of conversations runs: a tiny model, in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from engine_driver import tiny_model

ROOT = Path(__file__).resolve().parents[1]


def test_two_arrangements_compute_and_move_what_they_should(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "milestones.py"), "--how", "inprocess", "--repeats", "1"]
    command += ["--arrangements", "basic", "c3", "--model", str(tiny_model(tmp_path / "tiny")), "--sessions", "2"]
    command += ["--turns", "3", "--user-tokens", "11", "--answer-tokens", "13", "--block-size", "4"]
    done = subprocess.run(
        [*command, "--compilation-cache-dir", "off", "--output", str(tmp_path / "m.json"), "--logs", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "m.json").read_text())
    rows = {(row["arrangement"], row["turn"]): row for row in result["rows"]}
    assert len(result["turns"]) == 2 * 2 * 3 and not result["wrong"]
    # 11 + 13 + 11 = 35 tokens are the second prompt; 23 of the first 24 have keys and values when the first answer ends
    basic, full = rows["PD-Basic", 2], rows["PD-Caching-3", 2]
    assert (basic["computed"], basic["forward"], basic["back"]) == (35, 36, 0)
    assert (full["computed"], full["forward"], full["back"]) == (35 - 20, 36 - 20, 44 - 32)


def test_more_than_should_be_is_told(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from milestones_parts.tokens import Counts, Measured, violations
    from milestones_parts.ways import ARRANGEMENTS

    times = {"ttft_ms": 1.0, "tpot_ms": 1.0, "jct_ms": 1.0, "second_ms": 1.0}
    sizes = {"user": 10, "answer": 10, "prompt": 30, "last_prompt": 10, "last_answer": 10}
    good = Measured("PD-Caching-3", 0, 0, 2, **sizes, **times, computed=14, forward=16.0, back=16.0)
    total = Counts(forward=16.0, back=16.0, arrived=32.0, looked_up=30, found=16)
    assert violations(ARRANGEMENTS["c3"], [good], total, 16) == []
    assert len(violations(ARRANGEMENTS["c2"], [good], total, 16)) == 4  # each turn's, and the pools'
    late = Measured("PD-Caching-3", 0, 0, 2, **sizes, **times, computed=30, forward=16.0, back=16.0)
    told = violations(ARRANGEMENTS["c3"], [late], total, 16)
    assert len(told) == 2 and "30 tokens, not 11 to 26" in told[0]
