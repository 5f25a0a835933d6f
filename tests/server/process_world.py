"""Server processes on this machine, for tests: a front-end, its instances, and streams through them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from jmemserve.client import Client
from jmemserve.errors import JmemserveError
from jmemserve.server.messages import Delta, Finished
from jmemserve.types import FinishReason, SamplingParams

ENGINE = {
    "--max-num-seqs": "2",
    "--max-num-batched-tokens": "32",
    "--kv-cache-tokens": "2048",
    "--max-model-len": "512",
    "--warmup": "fast",
    "--heartbeat-timeout-s": "3",
}
START_S = 120
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
PROMPT = [(7 * n) % 500 + 3 for n in range(50)]


class Process:
    """A server process with its log."""

    def __init__(self, folder: Path, name: str, *flags: str, **changes: str):
        settings = ENGINE | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
        engine = [text for pair in settings.items() for text in pair]
        self.log = folder / f"{name}.log"
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        with self.log.open("w") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "jmemserve.serve", *flags, *engine],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait_for(self, pattern: str) -> str:
        """Until the log says so; what matched."""
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found[0]
            if self.popen.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in:\n{self.log.read_text()[-3000:]}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(60)


class World:
    """A front-end and its instances."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_bytes(os.urandom(32).hex().encode())
        self.cache = str(folder / "xla")
        self.started: list[Process] = []
        self.frontend = self.start("frontend", "--role", "frontend", "--port", "0")
        self.address = self.frontend.wait_for(r"listens on \S+").split()[-1]

    def start(self, name: str, *flags: str, **changes: str) -> Process:
        common = {"secret_file": str(self.secret), "compilation_cache_dir": self.cache}
        process = Process(self.folder, f"{len(self.started)}-{name}", *flags, **(common | changes))
        self.started.append(process)
        return process

    def join(self, role: str, name: str, **changes: str) -> Process:
        return self.start(name, "--role", role, "--join", self.address, "--name", name, **changes)

    def client(self) -> Client:
        return Client(self.address)

    def states(self) -> dict[str, str]:
        with self.client() as client:
            return {member.name: member.state for member in client.cluster().members}

    def wait_state(self, name: str, *states: str) -> None:
        limit = time.monotonic() + START_S
        while (now := self.states()).get(name) not in states:
            assert time.monotonic() < limit, f"{name} is not {states} but {now}"
            time.sleep(0.05)


class Stream(threading.Thread):
    """A stream that is followed on a thread of its own."""

    def __init__(self, world: World, prompt: list[int], params: SamplingParams = LONG, request_id: str = ""):
        super().__init__(daemon=True)
        self.world, self.prompt, self.params, self.request_id = world, prompt, params, request_id
        self.tokens: list[int] = []
        self.end: Finished | None = None
        self.error: JmemserveError | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.world.client() as client:
                for message in client.stream(self.prompt, self.params, request_id=self.request_id, timeout_s=120):
                    if isinstance(message, Delta):
                        self.tokens += message.tokens
                    else:
                        self.end = message
        except JmemserveError as error:
            self.error = error

    def wait_tokens(self, count: int) -> None:
        limit = time.monotonic() + 60
        while len(self.tokens) < count and self.is_alive():
            assert time.monotonic() < limit
            time.sleep(0.002)

    def result(self) -> list[int]:
        self.join(120)
        assert self.error is None and self.end is not None, self.error
        assert self.end.finish is FinishReason.LENGTH, self.end
        return self.tokens


def nothing_moves(client: Client) -> None:
    limit = time.monotonic() + 20
    while any(pool.transfers_out or pool.transfers_in for pool in client.pools()):
        assert time.monotonic() < limit
        time.sleep(0.02)


def nothing_held(world: World) -> None:
    limit = time.monotonic() + 30
    with world.client() as client:
        while any(load.held_blocks or load.running or load.waiting for load in client.loads()):
            assert time.monotonic() < limit, client.loads()
            time.sleep(0.1)
