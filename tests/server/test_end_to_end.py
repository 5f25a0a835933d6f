"""The real thing, once: ``python -m jmemserve.serve`` with the demo model, called over gRPC, ended by SIGTERM."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from jmemserve import errors
from jmemserve.client import Client
from jmemserve.server.messages import Finished
from jmemserve.types import FinishReason, SamplingParams

SIZES = "--max-num-seqs 2 --max-num-batched-tokens 32 --max-model-len 128 --kv-cache-tokens 1024 --warmup none"
WORDS = f"--port 0 --compilation-cache-dir off --shutdown-timeout 20 {SIZES}".split()


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that is loading, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jmemserve.serve", *WORDS], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()  # the port is open before anything is loaded
        assert first.startswith("jmemserve listens on "), first + process.stderr.read()
        yield process, first.split()[3]
    finally:
        process.kill()
        process.communicate()


def test_serve_call_and_stop(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with Client(address) as client:
        end = time.monotonic() + 60
        while not client.is_serving():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        greedy = SamplingParams(temperature=0, max_tokens=12)
        first, second = client.generate("Once upon a time", greedy), client.generate("Once upon a time", greedy)
        assert first[0].text and first[0].tokens == second[0].tokens and len(first[0].tokens) == 12
        ids = client.tokenize("Once upon a time")
        assert client.generate(ids, greedy)[0].tokens == first[0].tokens
        with pytest.raises(errors.InvalidRequest, match="at most 127"):
            client.generate([5] * 128)
        stream = client.stream("Once", SamplingParams(max_tokens=100, ignore_eos=True, seed=1))
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert isinstance(last, Finished) and last.finish is FinishReason.LENGTH
        assert last.usage.completion_tokens == 100 and last.timings.first_token_s > 0
        assert process.wait(30) == 0
