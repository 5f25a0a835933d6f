"""Instances in processes of their own: they join, are refused, leave, die and come back; streams do not notice."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jmemserve.client import Client
from jmemserve.errors import JmemserveError, UnknownRequest
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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("cluster"))
    try:
        first = world.join("prefill", "prefill0")
        first.wait_for("is a member")
        second = world.join("decode", "decode0")  # it finds what the first one compiled
        second.wait_for("is a member")
        world.frontend.wait_for("ready; try")
        yield world
        assert world.frontend.end() == 0, world.frontend.log.read_text()[-2000:]
    finally:
        for process in world.started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait(30)


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


@pytest.fixture(scope="module")
def truth(world: World) -> list[int]:
    """The answer to PROMPT while nothing happens."""
    return Stream(world, PROMPT).result()


PROMPT = [(7 * n) % 500 + 3 for n in range(50)]


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


def test_two_processes_serve_and_share_a_conversation(world: World, truth: list[int]) -> None:
    assert len(truth) == 300
    with world.client() as client:
        report = client.cluster()
        assert {m.name: (m.role, m.state) for m in report.members} == {
            "prefill0": ("prefill", "ready"),
            "decode0": ("decode", "ready"),
        }
        assert all(way.startswith("staged") for m in report.members for _, way in m.peers)
        nothing_moves(client)
        follow_up = [*PROMPT, *truth, 5, 6, 7]
        [output] = client.generate(follow_up, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        # What decode made has come back to prefill: all but the last, unfinished block.
        assert output.usage.cached_tokens >= (len(PROMPT) + len(truth) - 1) // 16 * 16
        assert all(load.compiles_after_warmup == 0 for load in client.loads())
    nothing_held(world)


def test_who_does_not_fit_is_refused_in_words(world: World) -> None:
    other = world.join("decode", "misfit", block_size="32")
    assert other.popen.wait(START_S) == 2
    text = other.log.read_text()
    assert "its --block-size is 32, that of" in text and "start it with the same model and flags" in text
    taken = world.join("decode", "longer", dtype="bfloat16")  # seen only when it is loaded
    assert taken.popen.wait(START_S) == 2
    assert "kind of blocks" in taken.log.read_text()
    (world.folder / "wrong").write_bytes(b"0" * 64)
    stranger = world.join("decode", "stranger", secret_file=str(world.folder / "wrong"))
    stranger.wait_for("another secret")
    stranger.end(signal.SIGKILL)
    assert "stranger" not in world.states()


def test_an_instance_joins_serves_and_leaves_during_a_stream(world: World, truth: list[int]) -> None:
    stream = Stream(world, PROMPT, request_id="moving")
    more = world.join("decode", "decode1")
    assert stream.result() == truth
    more.wait_for("is a member")
    stream = Stream(world, PROMPT, request_id="moving")
    stream.wait_tokens(20)
    with world.client() as client:
        there = client.move("moving", "decode1")
        assert there == ["decode1"]
    stream.wait_tokens(60)
    assert more.end() == 0, "SIGTERM: it gives away what it has and leaves"
    assert stream.result() == truth
    assert world.states()["decode1"] == "left"
    with world.client() as client:
        assert client.cluster().moves >= 1
        with pytest.raises(UnknownRequest, match="no instance 'decode1' is ready"):
            client.drain_instance("decode1")
    nothing_held(world)


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_the_stream_goes_on_when_its_instance_is_lost(world: World, truth: list[int], fault: str) -> None:
    victim = world.join("colocated", f"victim-{fault}")
    victim.wait_for("is a member")
    stream = Stream(world, PROMPT, request_id="survivor")
    stream.wait_tokens(10)
    with world.client() as client:
        try:
            client.move("survivor", f"victim-{fault}")
        except JmemserveError as error:
            assert "no other instance" in str(error)  # it is there already
    stream.wait_tokens(40)
    if fault == "kill":
        victim.end(signal.SIGKILL)
    else:
        victim.popen.send_signal(signal.SIGSTOP)
    assert stream.result() == truth
    if fault == "pause":
        world.wait_state(f"victim-{fault}", "dead")
        victim.popen.send_signal(signal.SIGCONT)
        world.wait_state(f"victim-{fault}", "ready")  # another life, its cache kept
        assert Stream(world, PROMPT).result() == truth
        nothing_held(world)
        assert victim.end() == 0
    nothing_held(world)


def test_roles_change_and_either_kind_is_enough(world: World, truth: list[int]) -> None:
    with world.client() as client:
        client.set_role("prefill0", "decode")
        limit = time.monotonic() + START_S
        while {m.name: m.role for m in client.cluster().members}["prefill0"] != "decode":
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert Stream(world, PROMPT).result() == truth
        client.set_role("prefill0", "prefill")
        while {m.name: m.role for m in client.cluster().members}["prefill0"] != "prefill":
            assert time.monotonic() < limit
            time.sleep(0.05)
        with pytest.raises(JmemserveError, match="role"):
            client.set_role("prefill0", "captain")
    assert Stream(world, PROMPT).result() == truth


def test_instances_join_again_when_the_front_end_comes_back(world: World, truth: list[int]) -> None:
    """A killed front-end is started anew at its port; its instances come by themselves, with what they cached."""
    port = world.address.rpartition(":")[2]
    world.frontend.end(signal.SIGKILL)
    world.frontend = world.start("frontend-again", "--role", "frontend", "--port", port)
    world.frontend.wait_for("ready; try")
    world.wait_state("prefill0", "ready")
    world.wait_state("decode0", "ready")
    with world.client() as client:
        [output] = client.generate(PROMPT, LONG)
        assert list(output.tokens) == truth
        assert output.usage.cached_tokens == 48
    nothing_held(world)
