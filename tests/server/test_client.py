"""The blocking client and both command lines, against a server in a thread."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator

import pytest
from conftest import VOCAB, Server, serving
from fake_cluster import PROFILE

from jmemserve import client_cli, errors
from jmemserve.client import Client, make_request
from jmemserve.scheduler.cost_model import Profile
from jmemserve.server.messages import Delta
from jmemserve.server.model import Model
from jmemserve.types import FinishReason, SamplingParams


@contextlib.contextmanager
def in_thread(model: Model) -> Iterator[Server]:
    """A server on a loop of its own."""
    ready, end = threading.Event(), threading.Event()
    found: list[Server] = []

    async def body() -> None:
        async with serving(model) as (server, _):
            found.append(server)
            ready.set()
            while not end.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(body()))
    thread.start()
    try:
        assert ready.wait(20)
        yield found[0]
    finally:
        end.set()
        thread.join(20)


def test_client(model: Model) -> None:
    with in_thread(model) as server, Client(server.address) as client:
        assert client.is_serving() and client.model_info().name == "small" and client.server_info().version
        assert client.loads() == server.cluster.loads() and client.reset_prefix_cache()
        tokens = client.tokenize("the cat")
        assert client.detokenize(tokens) == "the cat"
        [output] = client.generate([10], SamplingParams(max_tokens=3), request_id="r")
        assert output.tokens == (11, 12, 13) and output.finish is FinishReason.LENGTH
        messages = list(client.stream("the", SamplingParams(max_tokens=3)))
        assert sum(len(message.tokens) for message in messages if isinstance(message, Delta)) == 3
        with pytest.raises(errors.InvalidRequest, match="prompt is empty"):
            client.generate("")
        with pytest.raises(errors.DeadlineExceeded):
            client.generate([1], timeout_s=0.1)
        stream = client.stream([1], request_id="endless")
        next(stream)
        assert client.abort("endless") and not client.abort("other")
        assert list(stream)[-1].finish is FinishReason.ABORT  # type: ignore[union-attr]
        stream = client.stream([1])
        next(stream)
        stream.close()


def test_async_client(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            assert await client.is_serving() and (await client.model_info()).name == "small"
            assert (await client.server_info()).version and await client.loads() == server.cluster.loads()
            assert await client.reset_prefix_cache() and not await client.abort("nobody")
            assert await client.detokenize(await client.tokenize("the cat")) == "the cat"
            with pytest.raises(errors.InvalidRequest):
                await client.detokenize([VOCAB])

    asyncio.run(body())


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable):
        client.generate([1], timeout_s=5)


@pytest.mark.parametrize(
    "prompt", [[1, "x"], [True], [-1], [1 << 40], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_prompts_that_cannot_be_sent(prompt: list[object]) -> None:
    with pytest.raises(errors.InvalidRequest):
        make_request(prompt)  # type: ignore[arg-type]


HALF = "\ud800"  # of a character


@pytest.mark.parametrize(
    "how",
    [
        {"prompt": HALF},
        {"prompt": [{"role": "user", "content": HALF}]},
        {"prompt": [1], "tenant": HALF},
        {"prompt": [1], "session": HALF},
        {"prompt": [1], "request_id": HALF},
        {"prompt": [1], "cache_salt": HALF},
        {"prompt": [1], "cache_salt": "x" * 257},
    ],
)
def test_texts_that_cannot_be_sent(how: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidRequest, match="surrogate alone|at most 256 characters"):
        make_request(**how)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_deadlines_that_are_none(seconds: float) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest, match="above 0"):
        client.generate([1], timeout_s=seconds)


def test_params_that_cannot_be_sent() -> None:
    with pytest.raises(errors.InvalidRequest, match="cannot be sent"):
        make_request([1], SamplingParams(max_tokens=1 << 40))


def test_command_line(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(model) as server:

        def call(*words: str) -> tuple[int, str, str]:
            code = client_cli.main(["--address", server.address, *words])
            said = capsys.readouterr()
            return code, said.out, said.err

        code, out, err = call("--tokens", "64 65", "--max-tokens", "3")
        assert code == 0 and out == model.need_text().decode([66, 67, 68]) + "\n"
        assert "TTFT" in err and "TPOT" in err and "2 prompt tokens, 1 of them cached, 3 new" in err
        code, out, _ = call("--chat", "Hi", "--system", "Be kind", "--max-tokens", "1", "--seed", "5", "--json")
        [output] = json.loads(out)["outputs"]
        assert code == 0 and output["finish"] == "length" and len(output["tokens"]) == 1
        code, out, _ = call("--prompt", "x", "--n", "2", "--max-tokens", "2")
        assert code == 0 and out.startswith("--- 0\n") and "--- 1\n" in out
        code, out, err = call("--tokens", str(VOCAB))
        assert (code, out) == (1, "") and err.startswith("error: token id 320 is out of range")
        assert call("--file", "/nowhere/x")[0] == 1
        assert call("--tokens", "1", "--priority", "101")[2].startswith("error: priority must be a whole number from")
        words = ("--session", "s", "--tenant", "t", "--priority", "-3")
        assert call("--tokens", "1", "--max-tokens", "1", *words)[0] == 0
        last = server.cluster.submitted[-1]
        assert (last.session, last.tenant, last.priority) == ("s", "t", -3)
        assert call("--tokens", "1", "--max-tokens", "1", "--timeout", "1e300")[0] == 0
        assert call("--abort", "nobody") == (0, "not in flight\n", "")
        assert call("--health") == (0, "SERVING\n", "")
        assert json.loads(call("--info")[1])["model"]["name"] == "small"
        assert json.loads(call("--load")[1])[0]["total_blocks"] == 10
        assert Profile.from_json(call("--profile", "colocated0")[1]) == PROFILE
        code, _, err = call("--profile", "decode7")
        assert code == 1 and err == "error: there is no instance 'decode7'; those that there are: colocated0\n"


def test_command_line_interrupted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the request on the server too."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with in_thread(model) as server:
        monkeypatch.setattr("builtins.print", lambda *args, **how: interrupt() if how.get("flush") else None)
        assert client_cli.main(["--address", server.address, "--tokens", "64"]) == client_cli.INTERRUPTED
        end = threading.Event()
        while server.cluster.running:
            end.wait(0.01)


def test_command_line_needs_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client_cli.main([])
    assert caught.value.code == 2 and "--prompt" in capsys.readouterr().err
