"""Generate over a real port: what is streamed, what is refused, and that every way to leave frees everything."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import grpc
import pytest
from conftest import MAX_LEN, VOCAB, serving

from jmemserve import errors
from jmemserve.client import AsyncClient, make_request
from jmemserve.scheduler.admission import Limits
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server.generation import derive_seed
from jmemserve.server.messages import Delta, Finished, fold
from jmemserve.server.model import Model
from jmemserve.types import FinishReason, Request, SamplingParams, TokenLogprobs, Usage


def run(body: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, with a limit."""
    asyncio.run(asyncio.wait_for(body, 60))


def says(model: Model, text: str) -> Callable[[Request], list[int]]:
    """A script that answers every prompt with ``text``."""
    assert model.text is not None
    tokens = list(model.text.encode(text, add_special_tokens=False))
    return lambda request: list(tokens)


async def status_of(client: AsyncClient, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    """The status of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.inference.Generate(request, timeout=30):
            pytest.fail("it was accepted")
    return caught.value


def test_tokens_in_tokens_out(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            [output] = await client.generate([10, 11], SamplingParams(max_tokens=5, seed=4), request_id="me")
            assert output.tokens == (12, 13, 14, 15, 16) and output.finish is FinishReason.LENGTH
            assert output.request_id == "me" and output.usage == Usage(2, 5, 1) and output.timings.queue_s == 0.25
            [request] = server.cluster.submitted
            assert request.prompt == (10, 11) and request.seed == 4 and request.id == "me"
            assert request.stop_ids == model.eos_ids and request.deadline is None

    run(body())


def test_text_and_chat(model: Model) -> None:
    async def body() -> None:
        async with serving(model, says(model, "naïve 日本語 😀!")) as (server, client):
            [output] = await client.generate("the cat")
            assert output.text == "naïve 日本語 😀!" and output.finish is FinishReason.STOP
            [output] = await client.generate(
                [{"role": "user", "content": "the cat"}], template_arguments={"think": True}
            )
            assert output.text == "naïve 日本語 😀!"
            text = model.need_text()
            first, second = server.cluster.submitted
            assert text.decode(first.prompt, skip_special_tokens=False) == "<|begin|>the cat"
            chat = text.decode(second.prompt, skip_special_tokens=False)
            assert chat == "<|begin|><user>the cat\n<think><assistant>"

    run(body())


def test_without_tokenizer() -> None:
    model = Model("ids", VOCAB, MAX_LEN, frozenset(), None)

    async def body() -> None:
        async with serving(model) as (_, client):
            [output] = await client.generate([5], SamplingParams(max_tokens=2))
            assert output.tokens == (6, 7) and output.text == ""
            with pytest.raises(errors.InvalidRequest, match="no tokenizer; send token_ids"):
                await client.generate("text")
            with pytest.raises(errors.InvalidRequest, match="use stop_token_ids"):
                await client.generate([5], SamplingParams(stop=("x",)))

    run(body())


@pytest.mark.parametrize("keep", [False, True])
def test_stop_string_across_tokens(model: Model, keep: bool) -> None:
    async def body() -> None:
        async with serving(model, says(model, "abc xyz the end of it. More")) as (server, client):
            params = SamplingParams(stop=("nd of", "never"), include_stop_str_in_output=keep)
            messages = [message async for message in client.stream("go", params)]
            texts = [message.text for message in messages if isinstance(message, Delta)]
            [output] = fold(messages)
            assert output.text == ("abc xyz the end of" if keep else "abc xyz the e")
            assert all("nd" not in text for text in texts) or keep
            assert output.finish is FinishReason.STOP and output.matched_stop == "nd of"
            text = model.need_text().decode(output.tokens)
            assert text.startswith("abc xyz the end of") and output.usage.completion_tokens == len(output.tokens)
            assert ("More" not in text) and server.cluster.aborted[0][1] is FinishReason.STOP

    run(body())


def test_stop_string_not_before_min_tokens(model: Model) -> None:
    async def body() -> None:
        async with serving(model, says(model, "zzzzz")) as (_, client):
            [output] = await client.generate("go", SamplingParams(stop=("z",), min_tokens=3))
            assert output.text == "zzz" and len(output.tokens) == 4

    run(body())


def test_held_text_comes_at_the_end(model: Model) -> None:
    async def body() -> None:
        async with serving(model, says(model, "the en")) as (_, client):
            [output] = await client.generate("go", SamplingParams(stop=("end",)))
            assert output.text == "the en" and output.matched_stop is None

    run(body())


def test_logprobs(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            [output] = await client.generate([3], SamplingParams(max_tokens=3, logprobs=2))
            top = ((0, -0.0), (1, -1.0))
            assert output.logprobs == tuple(TokenLogprobs(token, -0.5, 1, top) for token in (4, 5, 6))

    run(body())


def test_several_outputs(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            outputs = await client.generate([3], SamplingParams(max_tokens=4, n=3, seed=9), request_id="r")
            assert [output.index for output in outputs] == [0, 1, 2]
            assert all(output.tokens == (4, 5, 6, 7) and output.request_id == "r" for output in outputs)
            assert [request.id for request in server.cluster.submitted] == ["r:0", "r:1", "r:2"]
            assert [request.seed for request in server.cluster.submitted] == [derive_seed(9, i) for i in range(3)]

    run(body())


def test_later_outputs_refused_by_a_full_queue(model: Model) -> None:
    async def body() -> None:
        async with serving(model, max_queue=2) as (_, client):
            outputs = await client.generate([3], SamplingParams(max_tokens=50, n=3))
            assert [output.finish.value for output in outputs] == ["length", "length", "error"]
            assert isinstance(outputs[2].error, errors.Overloaded)

    run(body())


def test_exactly_one_end_per_output_and_nothing_after_it(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            ended: set[int] = set()
            async for message in client.stream([3], SamplingParams(max_tokens=7, n=4)):
                assert message.index not in ended
                if isinstance(message, Finished):
                    ended.add(message.index)
            assert ended == {0, 1, 2, 3}

    run(body())


INVALID = {
    "no prompt": (pb.GenerateRequest(), "no prompt"),
    "empty text": (make_request(""), "prompt is empty"),
    "empty ids": (make_request([]), "prompt is empty"),
    "empty chat": (pb.GenerateRequest(messages=pb.Chat()), "messages is empty"),
    "unknown role": (make_request([{"role": "robot", "content": "x"}]), "unknown role robot"),
    "id out of range": (make_request([1, VOCAB]), "0 to 319"),
    "too long": (make_request([1] * MAX_LEN), "at most 99 "),
    "long text": (make_request("x" * 5000), "at most 99 "),
    "temperature": (make_request([1], SamplingParams(temperature=-0.5)), "temperature must be .* not -0.5"),
    "nan": (make_request([1], SamplingParams(top_p=float("nan"))), "top_p must be a number"),
    "inf": (make_request([1], SamplingParams(presence_penalty=float("inf"))), "presence_penalty"),
    "top_k": (make_request([1], SamplingParams(top_k=-2)), "top_k must be"),
    "max_tokens": (make_request([1], SamplingParams(max_tokens=0)), "max_tokens must be at least 1"),
    "negative max_tokens": (make_request([1], SamplingParams(max_tokens=-4)), "max_tokens must be at least 1, not -4"),
    "min_tokens": (make_request([1], SamplingParams(max_tokens=2, min_tokens=3)), "min_tokens must be"),
    "seed": (make_request([1], SamplingParams(seed=-1)), "seed must be"),
    "n": (make_request([1], SamplingParams(n=65)), "n must be from 1 to 64"),
    "logprobs": (make_request([1], SamplingParams(logprobs=21)), "logprobs must be"),
    "empty stop": (make_request([1], SamplingParams(stop=("",))), "stop takes"),
    "long stop": (make_request([1], SamplingParams(stop=("x" * 600,))), "512 characters"),
    "stop id": (make_request([1], SamplingParams(stop_token_ids=(VOCAB,))), "token id 320 is out of range"),
    "long request id": (make_request([1], request_id="x" * 257), "256 characters"),
}


def test_invalid_requests_each_with_a_sentence(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            for name, (request, sentence) in INVALID.items():
                error = await status_of(client, request)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, error)
                with pytest.raises(errors.InvalidRequest, match=sentence):
                    raise errors.InvalidRequest(error.details())
            assert server.cluster.submitted == []
            [output] = await client.generate([1], SamplingParams(max_tokens=1))
            assert output.tokens == (2,)

    run(body())


def test_unknown_model(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            request = make_request([1])
            request.model = "other"
            error = await status_of(client, request)
            assert error.code() is grpc.StatusCode.NOT_FOUND and "this server has 'small'" in (error.details() or "")
            request.model = "small"
            request.sampling.max_tokens = 1
            assert len([response async for response in client.inference.Generate(request)]) == 2

    run(body())


def test_oversize_message(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            error = await status_of(client, make_request("x" * (17 << 20)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or "")
            [output] = await client.generate([1], SamplingParams(max_tokens=1))
            assert output.tokens == (2,)

    run(body())


def test_duplicate_id(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            stream = client.stream([1], request_id="same")
            await anext(stream)
            with pytest.raises(errors.DuplicateRequest, match="'same' is in flight"):
                await client.generate([1], request_id="same")
            with pytest.raises(errors.DuplicateRequest):
                await client.generate([1], SamplingParams(n=2), request_id="same")
            await stream.aclose()
            await server.cluster.wait_idle()
            await asyncio.sleep(0.05)
            [output] = await client.generate([1], SamplingParams(max_tokens=1), request_id="same")
            assert output.tokens == (2,)

    run(body())


def test_full_queue_has_a_retry_hint(model: Model) -> None:
    async def body() -> None:
        async with serving(model, max_queue=1) as (_, client):
            stream = client.stream([1])
            await anext(stream)
            error = await status_of(client, make_request([1]))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailers = {key: value for key, value in error.trailing_metadata()}
            assert trailers["retry-pushback-ms"] == "1500"
            assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
            with pytest.raises(errors.Overloaded) as caught:
                await client.generate([1])
            assert caught.value.retry_after_s == 1.5
            await stream.aclose()

    run(body())


def test_who_asks_and_how_urgently(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            params = SamplingParams(max_tokens=2, n=2)
            await client.generate([1], params, session="s" * 256, tenant="t", priority=-100)
            assert {(r.session, r.tenant, r.priority, r.rank) for r in server.cluster.submitted} == {
                ("s" * 256, "t", -100, 0.0)
            }
            await client.generate([1], SamplingParams(max_tokens=2))
            assert (server.cluster.submitted[-1].tenant, server.cluster.submitted[-1].priority) == ("", 0)
            for field, value, sentence in (
                ("priority", 101, "priority must be a whole number from -100 to 100, not 101"),
                ("tenant", "t" * 257, "tenant must be a text of at most 256 characters, not 257"),
                ("session", "s" * 300, "session must be a text of at most 256 characters, not 300"),
            ):
                with pytest.raises(errors.InvalidRequest, match=sentence):
                    make_request([1], **{field: value})  # type: ignore[arg-type]
                message = make_request([1])
                setattr(message, field, value)
                error = await status_of(client, message)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and error.details() == sentence

    run(body())


def test_early_refusal_has_the_hint_of_the_prediction(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            limits = Limits(max_queue=10, max_queue_delay_s=2.0)
            monkeypatch.setattr(server.cluster, "submit", lambda request: limits.check_delay(5.25, None))
            error = await status_of(client, make_request([1]))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "--max-queue-delay" in (error.details() or "")
            trailers = {key: value for key, value in error.trailing_metadata()}
            assert trailers["retry-pushback-ms"] == "3250"
            assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
            with pytest.raises(errors.Overloaded) as caught:
                await client.generate([1])
            assert caught.value.retry_after_s == 3.25

    run(body())


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_client_cancel_frees_everything(model: Model, paused: bool, n: int) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            stream = client.stream([1], SamplingParams(n=n), request_id="c")
            await anext(stream)
            if paused:
                server.cluster.paused.set()
                await asyncio.sleep(0.05)
            await stream.aclose()
            await server.cluster.wait_idle()
            assert {reason for _, reason in server.cluster.aborted} == {FinishReason.ABORT}

    run(body())


def test_client_cancel_before_the_first_token(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.cluster.paused.set()
            task = asyncio.create_task(client.generate([1]))
            while not server.cluster.running:
                await asyncio.sleep(0.001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await server.cluster.wait_idle()

    run(body())


def test_client_that_vanishes(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, _):
            other = AsyncClient(server.address)
            await anext(other.stream([1]))
            await other.close()
            await server.cluster.wait_idle()

    run(body())


def test_client_deadline(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.cluster.paused.set()
            start = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded):
                await client.generate([1], timeout_s=0.2)
            await server.cluster.wait_idle()
            assert time.monotonic() - start < 5
            [request] = server.cluster.submitted
            assert request.deadline is not None and 0 < request.deadline - request.arrival <= 0.2
            assert server.cluster.aborted[0][1] is FinishReason.DEADLINE

    run(body())


@pytest.mark.parametrize("n", [1, 2])
def test_abort(model: Model, n: int) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            stream = client.stream([1], SamplingParams(n=n), request_id="long")
            messages = [await anext(stream)]
            assert await client.abort("long")
            messages += [message async for message in stream]
            outputs = fold(messages)
            assert [output.finish for output in outputs] == [FinishReason.ABORT] * n
            assert outputs[0].usage.completion_tokens == len(outputs[0].tokens) > 0
            assert not await client.abort("long")
            assert not await client.abort("never heard of")

    run(body())


def test_abort_before_the_first_token_ends_every_output(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.cluster.paused.set()
            task = asyncio.create_task(client.generate([1], SamplingParams(n=3), request_id="x"))
            while not server.cluster.running:
                await asyncio.sleep(0.001)
            assert await client.abort("x")
            assert [output.finish for output in await task] == [FinishReason.ABORT] * 3

    run(body())


def test_engine_failure_reaches_every_stream(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.cluster.paused.set()
            tasks = [asyncio.create_task(client.generate([1], SamplingParams(n=2))) for _ in range(3)]
            while len(server.cluster.running) < 3:
                await asyncio.sleep(0.001)
            server.cluster.fail("the device is on fire")
            for task in tasks:
                for output in await task:
                    assert output.finish is FinishReason.ERROR and "on fire" in str(output.error)
            server.frontend.on_failure(RuntimeError("on fire"))
            await server.frontend.ended.wait()
            with pytest.raises(errors.Unavailable, match="engine has failed"):
                await client.generate([1])

    run(body())


def test_a_slow_reader_gets_everything_in_few_messages(model: Model) -> None:
    async def body() -> None:
        async with serving(model, lambda request: [2] * 1500) as (server, client):
            stream = client.stream([1])
            messages = [await anext(stream)]
            await asyncio.sleep(0.5)
            messages += [message async for message in stream]
            assert len(fold(messages)[0].tokens) == 1500

    run(body())


def test_many_at_once(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            prompts = [[i % 100, (7 * i) % VOCAB] for i in range(150)]
            results = await asyncio.gather(
                *[client.generate(prompt, SamplingParams(max_tokens=1 + i % 9)) for i, prompt in enumerate(prompts)]
            )
            for i, (prompt, [output]) in enumerate(zip(prompts, results, strict=True)):
                assert output.tokens == tuple((prompt[-1] + j) % VOCAB for j in range(1, 2 + i % 9))

    run(body())


def test_calls_in_flight_are_bounded(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.frontend._max_calls = 2
            streams = [client.stream([i]) for i in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(errors.Overloaded, match="2 calls are in flight"):
                await client.generate([1])
            for stream in streams:
                await stream.aclose()

    run(body())


def test_any_mix_of_leaving_frees_everything(model: Model) -> None:
    """Many calls at once that end, are cancelled at random moments, aborted, or run into a deadline."""

    async def one(client: AsyncClient, random: Random, name: str) -> None:
        timeout_s = random.choice([None, None, 0.03])
        leave_after = random.choice([0, 1, 3, 1000])
        # Whoever stays to the end gets one; for the others, only leaving ends it.
        max_tokens = random.choice([1, 5, 40]) if timeout_s is None and leave_after == 1000 else None
        params = SamplingParams(max_tokens=max_tokens, n=random.choice([1, 1, 3]), stop=("never",))
        stream = client.stream([random.randrange(VOCAB)], params, request_id=name, timeout_s=timeout_s)
        with contextlib.suppress(errors.DeadlineExceeded):
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    leave_after -= 1
                    if leave_after < 0:
                        break
                    if random.random() < 0.02:
                        await client.abort(name)

    async def body() -> None:
        random = Random(0)
        async with serving(model, max_queue=60) as (server, client):
            for round in range(4):
                calls = [one(client, random, f"{round}-{i}") for i in range(25)]
                await asyncio.gather(*calls)
                await server.cluster.wait_idle()
            while server.frontend.num_calls:
                await asyncio.sleep(0.001)
            assert not server.frontend._calls and not server.frontend._owners

    run(body())
