"""A cluster of real instances in a server process, asked over gRPC."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from milestones_parts.ways import _address
from policies_parts.documents import Session
from policies_parts.rows import Asked

from jmemserve.client import Client
from jmemserve.server.messages import Delta
from jmemserve.types import FinishReason, SamplingParams

ANSWER_S = 300.0


class Server:
    """One policy's server."""

    def __init__(self, client: Client):
        self.client = client
        self.vocab_size = client.model_info().vocab_size

    def play(self, sessions: list[Session]) -> list[Asked]:
        """All sessions at their times, from empty caches."""
        self.client.reset_prefix_cache()
        found: list[Asked] = []
        failures: list[BaseException] = []
        lock, start = threading.Lock(), time.perf_counter() + 0.2

        def converse(session: Session) -> None:
            try:
                time.sleep(max(0.0, start + session.start_s - time.perf_counter()))
                for prompt, answer in session.turns:
                    one = self._ask(session.name, prompt, answer)
                    with lock:
                        found.append(one)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=converse, args=(session,), daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise SystemExit(f"a request failed: {failures[0]}")
        return found

    def computed(self) -> dict[str, int]:
        """Prompt tokens that each instance has computed since it began."""
        loads = self.client.loads()
        return {load.instance: load.prefix_queries - load.prefix_hits for load in loads if load.role != "decode"}

    def _ask(self, session: str, prompt: tuple[int, ...], answer: int) -> Asked:
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
        sent, first, cached = time.perf_counter(), 0.0, 0
        for message in self.client.stream(prompt, params, timeout_s=ANSWER_S, session=session):
            if isinstance(message, Delta):
                first = first or time.perf_counter() - sent
            elif message.finish is not FinishReason.LENGTH:
                raise SystemExit(f"an answer ended early, {message.finish.value}: {message.error}")
            else:
                cached = message.usage.cached_tokens
        return Asked(len(prompt), cached, first, time.perf_counter() - sent, answer)


@contextlib.contextmanager
def serve(policy: str, mesh: str, flags: dict[str, str], log: Path) -> Iterator[Server]:
    """A server with this policy, all instances in one process."""
    texts = [text for name, value in flags.items() for text in ("--" + name, value)]
    command = [sys.executable, "-m", "jmemserve.serve", "--mesh", mesh, "--policy", policy, "--port", "0", *texts]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        with Client(_address(server, log)) as client:
            yield Server(client)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
