"""The benchmarks of kernels and engine run, and count bytes and FLOP right; how fast they are, is not tested."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_quick_run(tmp_path: Path) -> None:
    output, plot = tmp_path / "kernels.json", tmp_path / "kernels.png"
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--output", str(output), "--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    by = {(row["part"], row["by"]): row for row in found["rows"]}
    assert {"decode", "prefill", "moves", "products"} == {part for part, _ in by} and plot.stat().st_size > 10_000
    assert by["decode", "xla"]["bytes"] == 2 * 4 * 2 * 40 * 2 * 64
    assert by["prefill", "xla"]["flop"] == 4 * (32 * 33 / 2) * 4 * 64
    assert by["moves", "xla"]["bytes"] == 2 * 4 * (4 * 2 * 2 * 16 * 64 * 4)
    assert all(row["seconds"] > 0 and row["of_peak"] > 0 for row in found["rows"])
    assert any("jax's paged kernel" in line for line in found["skipped"])


def test_an_unknown_backend_is_refused() -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--backends", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "--backends takes" in done.stderr


def test_one_that_fails_does_not_stop_the_others(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    kernels = importlib.import_module("kernels")
    found = kernels.Found()
    row = kernels.cases.Row("decode", "a case", "us", 1.0, bytes=1.0)

    def broken():
        raise RuntimeError("no such instruction\nand more of it")

    found.measure("decode", iter([("ours, small", broken), ("ours, large", lambda: row)]), 60.0)
    found.measure("prefill", iter([("ours", lambda: row)] * 3), -1.0)
    assert found.rows == [row]
    assert found.failed == ["decode: ours, small: RuntimeError: no such instruction"]
    assert found.skipped == ["prefill: no time was left for the last 3 of 3 cases"]


def test_the_engine_benchmark_runs(tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--config", "benchmarks/configs/llama-28m"]
    command += ["--output", str(output), "--profile", str(tmp_path / "traces")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())
    assert [row["what"] for row in found["rows"]] == ["prefill", "decode"]
    assert all(row["tokens_per_s"] > 0 and row["limit"] > 0 for row in found["rows"])
    assert {(row["medium"], row["cached_percent"]) for row in found["first_token"]} == {
        (medium, share) for medium in ("HBM", "DRAM") for share in (0, 25, 50, 75, 100)
    }
    assert [row["what"] for row in found["profiles"]] == ["decode 2", "prefill 64"]
    assert all(row["kinds"] and row["seconds"] > 0 for row in found["profiles"])
    assert len(list((tmp_path / "traces").iterdir())) == 2


def test_time_is_summed_by_what_a_device_did(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    profiles = importlib.import_module("engine_parts.profiles")

    def named(what: str, pid: int, name: str, tid: int = 0) -> dict:
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}

    def did(name: str, pid: int, tid: int, start: float, micros: float, **args: str) -> dict:
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": micros, "args": args}

    host = [
        named("process_name", 1, "/host:CPU"),
        did("while.3", 1, 7, 0, 100, hlo_op="while.3"),
        did("dot.1", 1, 7, 10, 30, hlo_op="dot.1"),
        did("dot.2", 1, 7, 50, 20, hlo_op="dot.2"),
        did("waits", 1, 7, 0, 500),
    ]
    whole, kinds = profiles.summed(host)
    assert whole == 100e-6
    assert [(kind.name, round(kind.seconds * 1e6), kind.count) for kind in kinds] == [("while", 50, 1), ("dot", 50, 2)]
    device = [
        named("process_name", 2, "/device:GPU:0"),
        named("thread_name", 2, "Stream #13(Compute)", 1),
        named("thread_name", 2, "XLA Ops", 2),
        did("gemm_fusion_dot_4", 2, 1, 1000, 40),
        did("gemm_fusion_dot_12", 2, 1, 1060, 40),
        did("gemm_fusion_dot_4", 2, 2, 1000, 40, hlo_op="gemm_fusion_dot_4"),
    ]
    whole, kinds = profiles.summed(host + device)
    assert whole == 100e-6
    assert kinds == [profiles.Kind("gemm_fusion_dot", 80e-6, 2)]
