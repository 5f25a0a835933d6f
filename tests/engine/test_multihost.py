"""One instance on the devices of two processes: the same tokens as in one, and they end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from multihost_process import Tokens, cluster_spec, make_tokens

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("multihost_process.py")


class Job:
    """Two processes; the first is the leader."""

    def __init__(self, folder: Path, mode: str, devices: int = 1, seeds=(0, 0), **engine: object):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.outputs = [folder / f"output-{mode}-{number}" for number in range(2)]
        self.errors = [folder / f"errors-{mode}-{number}" for number in range(2)]
        self.processes = []
        for number, path in enumerate(self.errors):
            settings = {"seed": seeds[number], **engine}
            wish = {"process": number, "num": 2, "port": port, "devices": devices, "mode": mode, "engine": settings}
            command = [sys.executable, str(SCRIPT), json.dumps(wish)]
            with path.open("w") as stderr, self.outputs[number].open("w") as stdout:
                self.processes.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env))

    def said(self, number: int) -> str:
        return self.errors[number].read_text()

    def answer(self, timeout_s: float = 120) -> dict:
        """The leader's line of JSON; others are of libraries."""
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit and all(process.poll() is None for process in self.processes):
            for line in self.outputs[0].read_text().splitlines(keepends=True):
                if line.startswith("{") and line.endswith("\n"):
                    return json.loads(line)
            time.sleep(0.05)
        raise AssertionError(f"no answer:\n{self.said(0)}\n{self.said(1)}")

    def codes(self, timeout_s: float) -> list[int]:
        """Exit codes of both, within so many seconds."""
        limit = time.monotonic() + timeout_s
        return [process.wait(max(0.0, limit - time.monotonic())) for process in self.processes]


@contextlib.contextmanager
def started(*args, **kwargs) -> Iterator[Job]:
    job = Job(*args, **kwargs)
    try:
        yield job
    finally:
        for process in job.processes:
            process.kill()
            process.wait()


def tokens_of_one_process(num_devices: int) -> dict:
    tokens = Tokens(cluster_spec(num_devices))
    try:
        tokens.cluster.start()
        return make_tokens(tokens)
    finally:
        tokens.cluster.stop()


def check(job: Job, num_devices: list[int]) -> None:
    """The job's tokens are those of one process, and it did all that it was made to do."""
    expected = [tokens_of_one_process(num) for num in num_devices]
    made = job.answer()
    stats = made.pop("stats")
    assert stats["swapped_out"] > 20 and stats["swapped_in"] > 20 and stats["hits"] > 100, stats
    assert stats["preemptions"] > 0 and stats["compiles"] == 0, stats
    for other in expected:
        del other["stats"]
        assert made == other


def test_two_processes_make_the_same_tokens_and_end_together(tmp_path: Path) -> None:
    with started(tmp_path, "tokens") as job:
        check(job, [1, 2])
        job.processes[1].send_signal(signal.SIGTERM)  # whichever of them is asked to end, all end in order
        assert job.codes(20) == [0, 0], job.said(0) + job.said(1)
        assert "stopped; 0 programs were compiled after the start" in job.said(1)


@pytest.mark.slow
def test_two_processes_of_two_devices_and_pages_by_layer(tmp_path: Path) -> None:
    with started(tmp_path, "tokens", devices=2, layout="discrete") as job:
        check(job, [1, 4])
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.codes(20) == [0, 0], job.said(0) + job.said(1)


@pytest.mark.parametrize("dies, lives", [(1, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_who_loses_the_other_says_so_and_ends(tmp_path: Path, dies: int, lives: int) -> None:
    with started(tmp_path, "busy") as job:
        job.answer()
        time.sleep(0.2)
        job.processes[dies].kill()
        began = time.monotonic()
        assert job.processes[lives].wait(20) != 0
        assert time.monotonic() - began < 10
        assert f"process {dies} of this instance was lost" in job.said(lives)


@pytest.mark.slow
def test_processes_that_were_started_differently_refuse_each_other(tmp_path: Path) -> None:
    """Nothing hangs: both say what is wrong before they load anything."""
    with started(tmp_path, "idle", seeds=(0, 1)) as job:
        assert all(code != 0 for code in job.codes(60))
        assert "started otherwise" in job.said(0) and "started otherwise" in job.said(1)
