"""Starts one process per instance on this machine, watches them, and starts again those that die."""

import asyncio
import collections
import contextlib
import os
import shutil
import sys
import time

from jmemserve.config import InstanceSpec
from jmemserve.engine.report import Report
from jmemserve.server.flags import ServeConfig, engine_arguments
from jmemserve.server.net.secret import VARIABLE

BACK_OFF_S = 0.5  # before the first new start; doubled for each that follows soon, up to
MAX_BACK_OFF_S = 30.0
STEADY_S = 10.0  # who lived so long begins with the shortest wait again
GIVE_UP = 5  # deaths in a row without ever having been a member
KEPT_LINES = 200  # of what a process said last
END_S = 10.0  # for a process to end by itself
LONGEST_LINE = 1 << 16


class Supervisor:
    """The processes of a cluster's instances. All methods on the loop's thread."""

    def __init__(self, config: ServeConfig, report: Report, address: str, secret: bytes):
        self._config, self._report, self._address, self._secret = config, report, address, secret
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False
        self.first_traceback = ""  # of the first death
        self.gave_up = asyncio.Event()  # an instance cannot be started at all
        self.none_left = asyncio.Event()  # none of them can
        self._given_up = 0

    def start(self) -> None:
        """Start every instance."""
        for spec in self._config.cluster.instances:
            self._tasks.append(asyncio.ensure_future(self._keep(spec)))

    def pids(self) -> dict[str, int]:
        """The processes that run now."""
        return {name: process.pid for name, process in self._processes.items() if process.returncode is None}

    async def stop(self) -> None:
        """End every process: their standard input ends, which they take for a wish; then by force."""
        self._stopping = True
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=END_S)
            for process in self._processes.values():
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            if late:
                await asyncio.wait(late, timeout=END_S)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _keep(self, spec: InstanceSpec) -> None:
        """One instance, life after life."""
        delay, early = BACK_OFF_S, 0
        while not self._stopping:
            began = time.monotonic()
            lines = collections.deque[str](maxlen=KEPT_LINES)
            code = await self._run(spec, lines)
            if self._stopping or code == 0:
                return
            lived = time.monotonic() - began
            self._note_death(spec, code, lines)
            was_member = any(" is a member of " in line for line in lines)
            early = 0 if was_member else early + 1
            if code == 2 or early >= GIVE_UP:
                self._report.line(f"{spec.name} cannot be started; giving it up")
                self.gave_up.set()
                self._given_up += 1
                if self._given_up == len(self._tasks):
                    self.none_left.set()
                return
            delay = BACK_OFF_S if lived > STEADY_S else min(2 * delay, MAX_BACK_OFF_S)
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            self._report.line(f"{spec.name} {how}; starting it again in {delay:g} s")
            await asyncio.sleep(delay)

    async def _run(self, spec: InstanceSpec, lines: collections.deque[str]) -> int:
        """One life; its exit code."""
        process = await asyncio.create_subprocess_exec(
            *self._command(spec),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {VARIABLE: self._secret.hex()} | visible_devices(spec),
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is for the front-end, which drains first
        )
        self._processes[spec.name] = process
        if self._stopping and process.stdin is not None:
            process.stdin.close()
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:
                continue  # a line that is longer than anybody reads
            if not raw:
                break
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            self._report.line(f"[{spec.name}] {line}")
        return await process.wait()

    def _command(self, spec: InstanceSpec) -> list[str]:
        own = {
            "--role": spec.role.value,
            "--mesh": f"model={spec.model_axis}",
            "--name": spec.name,
            "--join": self._address,
            "--listen": "127.0.0.1:0",
            "--shutdown-timeout": f"{self._config.shutdown_timeout_s:g}",
        }
        arguments = [text for pair in own.items() for text in pair]
        engine = engine_arguments(self._config.cluster.engine)
        return [sys.executable, "-m", "jmemserve.serve", *arguments, "--ends-with-stdin", "on", *engine]

    def _note_death(self, spec: InstanceSpec, code: int, lines: collections.deque[str]) -> None:
        text = list(lines)
        starts = [number for number, line in enumerate(text) if line.startswith("Traceback (most recent call last)")]
        if not self.first_traceback and starts:
            self.first_traceback = f"[{spec.name}] " + "\n".join(text[starts[0] :])


def visible_devices(spec: InstanceSpec) -> dict[str, str]:
    """Environment that leaves a process its own accelerators only."""
    numbers = [str(index) for index in spec.device_indices]
    if os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):  # TPU
        return {
            "TPU_VISIBLE_CHIPS": ",".join(numbers),
            "TPU_CHIPS_PER_PROCESS_BOUNDS": f"1,{len(numbers)},1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
    if shutil.which("nvidia-smi") or "CUDA_VISIBLE_DEVICES" in os.environ:
        given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        chosen = [given[int(number)] for number in numbers if int(number) < len(given)] if given else numbers
        return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
    return {}
