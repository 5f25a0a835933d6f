"""Health, reflection, the Control service, tokenise and detokenise, and what is refused while loading and draining."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import pytest
from conftest import MAX_LEN, VOCAB, serving
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import jmemserve
from jmemserve import errors
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import wire
from jmemserve.server.frontend import State
from jmemserve.server.messages import Finished
from jmemserve.server.model import Model
from jmemserve.types import FinishReason, SamplingParams

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 60))


def test_health_from_loading_to_draining(model: Model) -> None:
    async def body() -> None:
        async with serving(model, opened=False) as (server, client):
            watch = client.health.Watch(health_pb2.HealthCheckRequest(service="jmemserve.v1.Inference"))
            assert (await watch.read()).status == NOT_SERVING
            control = await client.health.Check(health_pb2.HealthCheckRequest(service="jmemserve.v1.Control"))
            assert control.status == SERVING
            assert (await client.health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            await server.open()
            assert (await watch.read()).status == SERVING
            assert (await client.health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            draining = asyncio.create_task(server.frontend.drain(5))
            await asyncio.sleep(0)
            await server.grpc.publish()
            assert (await watch.read()).status == NOT_SERVING
            assert await draining
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.health.Check(health_pb2.HealthCheckRequest(service="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            watch.cancel()

    run(body())


def test_loading_answers_unavailable(model: Model) -> None:
    async def body() -> None:
        async with serving(model, opened=False) as (server, client):
            with pytest.raises(errors.Unavailable, match="still loading"):
                await client.generate([1])
            for call in (
                client.inference.GetModelInfo(pb.GetModelInfoRequest()),
                client.inference.Tokenize(pb.TokenizeRequest(text="x")),
                client.control.ResetPrefixCache(pb.ResetPrefixCacheRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert dict(caught.value.trailing_metadata())["retry-pushback-ms"] == "2000"
            info = await client.control.GetServerInfo(pb.GetServerInfoRequest())
            assert info.state == pb.SERVER_STATE_LOADING
            assert not (await client.control.GetLoad(pb.GetLoadRequest())).instances
            await server.open()
            assert len(await client.generate([1], SamplingParams(max_tokens=1))) == 1

    run(body())


def test_draining_finishes_what_runs_and_refuses_the_rest(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            running = client.stream([1], SamplingParams(max_tokens=300))
            await anext(running)
            draining = asyncio.create_task(server.frontend.drain(30))
            await asyncio.sleep(0.02)
            with pytest.raises(errors.Unavailable, match="shutting down"):
                await client.generate([1])
            *_, last = [message async for message in running]
            assert isinstance(last, Finished) and last.finish is FinishReason.LENGTH and await draining
            assert server.frontend.state is State.DRAINING

    run(body())


def test_draining_aborts_what_takes_too_long(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, client):
            server.cluster.paused.set()
            task = asyncio.create_task(client.generate([1]))
            while not server.cluster.running:
                await asyncio.sleep(0.001)
            assert not await server.frontend.drain(0.05)
            assert [output.finish for output in await task] == [FinishReason.ABORT]

    run(body())


def test_model_and_server_info(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            info = await client.inference.GetModelInfo(pb.GetModelInfoRequest())
            assert (info.name, info.vocab_size, info.max_model_len) == ("small", VOCAB, MAX_LEN)
            assert info.eos_token_ids == sorted(model.eos_ids) and info.has_tokenizer and info.has_chat_template
            server = await client.control.GetServerInfo(pb.GetServerInfoRequest())
            assert server.version == jmemserve.__version__ and server.server_id and server.state == 2
            assert [(i.name, i.model_axis, i.first_device) for i in server.instances] == [
                ("prefill0", 1, 0),
                ("decode0", 2, 1),
            ]
            load = await client.control.GetLoad(pb.GetLoadRequest())
            assert [wire.load_from_wire(entry) for entry in load.instances] == _.cluster.loads() and load.calls == 0
            assert (await client.control.ResetPrefixCache(pb.ResetPrefixCacheRequest())).done

    run(body())


def test_every_number_is_present() -> None:
    """No reader has to guess whether a 0 was meant: numbers are optional in the proto."""
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            if field.cpp_type not in (field.CPPTYPE_STRING, field.CPPTYPE_MESSAGE, field.CPPTYPE_ENUM):
                assert field.has_presence or field.is_repeated, field.full_name


def test_tokenize_and_detokenize(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (_, client):
            stub, text = client.inference, model.need_text()
            answer = await stub.Tokenize(pb.TokenizeRequest(text="the café"))
            assert tuple(answer.token_ids) == text.encode("the café")
            bare = await stub.Tokenize(pb.TokenizeRequest(text="the café", add_special_tokens=False))
            assert bare.token_ids == answer.token_ids[1:]
            chat = wire.chat_to_wire([{"role": "user", "content": "Hi"}])
            tokens = (await stub.Tokenize(pb.TokenizeRequest(messages=chat))).token_ids
            rendered = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens, skip_special_tokens=False))
            assert rendered.text == "<|begin|><user>Hi\n<assistant>"
            assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens))).text == "<user>Hi\n<assistant>"
            for call in (
                stub.Tokenize(pb.TokenizeRequest()),
                stub.Detokenize(pb.DetokenizeRequest(token_ids=[VOCAB])),
                client.control.Abort(pb.AbortRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(body())


def test_reflection(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, _), grpc.aio.insecure_channel(server.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)

            async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")
                yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="jmemserve.v1.Inference")

            names, file = [answer async for answer in stub.ServerReflectionInfo(ask())]
            assert {service.name for service in names.list_services_response.service} >= {
                "jmemserve.v1.Inference",
                "jmemserve.v1.Control",
                "grpc.health.v1.Health",
            }
            assert b"GenerateRequest" in b"".join(file.file_descriptor_response.file_descriptor_proto)

    run(body())


def test_port_in_use(model: Model) -> None:
    async def body() -> None:
        async with serving(model) as (server, _):
            from jmemserve.server.grpc_server import GrpcServer

            other = GrpcServer(server.frontend)
            with pytest.raises(errors.Unavailable, match="in use"):
                await other.start("127.0.0.1", int(server.address.split(":")[1]))
            await other.stop(0)

    run(body())
