"""A server process from the open port to its exit code, with a cluster that has no model."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_text
from conftest import MAX_LEN, VOCAB, count_up
from fake_cluster import FakeCluster

from jmemserve import errors, serve
from jmemserve.client import Client
from jmemserve.config import ClusterSpec
from jmemserve.engine.report import Report, SilentReport
from jmemserve.server import app
from jmemserve.server.flags import parse_flags
from jmemserve.server.messages import Finished, Message
from jmemserve.types import Event, FinishReason


class StartedCluster(FakeCluster):
    """With the parts of a cluster that only start-up sees."""

    folder: Path
    made: list["StartedCluster"] = []
    start_error: BaseException | None = None

    def __init__(
        self,
        spec: ClusterSpec,
        report: Report,
        on_events: Callable[[list[Event]], None],
        name: str = "",
        membership: object = None,
    ):
        super().__init__(on_events, count_up)
        self.on_failure: Callable[[BaseException], None] = lambda failure: None
        self.vocab_size = VOCAB
        self.max_model_len = MAX_LEN
        self.made.append(self)

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[StartedCluster]:
    small_text.write_folder(tmp_path)

    class Own(StartedCluster):
        folder = tmp_path
        made = []

    monkeypatch.setattr(app, "Cluster", Own)
    monkeypatch.setattr(app, "model_folder", lambda engine: tmp_path)
    return Own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_beside(body: Callable[[Client], None], *words: str) -> int:
    """The exit code of a server, while ``body`` runs in a thread with a client of it."""
    port = free_port()
    failures: list[BaseException] = []

    def beside() -> None:
        try:
            with Client(f"127.0.0.1:{port}") as client:
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    try:
                        if client.is_serving():
                            break
                    except errors.Unavailable:
                        pass
                    time.sleep(0.01)
                body(client)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=beside)
    thread.start()
    config, _ = parse_flags(["--port", str(port), *words])
    code = asyncio.run(asyncio.wait_for(app.run(config, SilentReport()), 60))
    thread.join(20)
    assert failures == []
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(cluster: type[StartedCluster], number: signal.Signals) -> None:
    ends: list[Message] = []

    def body(client: Client) -> None:
        stream = client.stream([1])
        next(stream)
        os.kill(os.getpid(), number)
        time.sleep(0.02)
        os.kill(os.getpid(), number)
        *_, last = stream
        ends.append(last)

    assert run_beside(body, "--shutdown-timeout", "0.3") == 0
    assert [isinstance(end, Finished) and end.finish for end in ends] == [FinishReason.ABORT]
    assert not cluster.made[0].running


def test_a_dead_engine_ends_the_process(cluster: type[StartedCluster], capsys: pytest.CaptureFixture[str]) -> None:
    def body(client: Client) -> None:
        stream = client.stream([1])
        next(stream)
        cluster.made[0].fail("the device is on fire")
        cluster.made[0].on_failure(RuntimeError("the first cause"))
        *_, last = stream
        assert isinstance(last, Finished) and last.finish is FinishReason.ERROR

    assert run_beside(body) == 1
    assert capsys.readouterr().err.rstrip().endswith("RuntimeError: the first cause")


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert serve.main(["--port", str(taken.getsockname()[1])]) == 1
    said = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1 port" in said and "already in use" in said and "Traceback" not in said


def test_a_model_that_cannot_be_served(
    cluster: type[StartedCluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "start_error", errors.CheckpointError("tensor x is missing"))
    assert serve.main(["--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.rstrip().endswith("jmemserve: tensor x is missing") and "Traceback" not in said


def test_an_unknown_model_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--port", "0", "--model", "/nowhere/at/all"]) == 2
    assert "there is no /nowhere/at/all/config.json" in capsys.readouterr().err


def test_a_broken_tokenizer(cluster: type[StartedCluster], capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "tokenizer.json").write_text("{")
    assert serve.main(["--port", "0"]) == 2
    assert "not a usable tokenizer" in capsys.readouterr().err
