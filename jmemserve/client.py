"""Clients of the gRPC API: ``Client`` for plain code, ``AsyncClient`` for asyncio. The command line is in client_cli.

    with Client("127.0.0.1:50051") as client:
        for delta in client.stream("Once upon a time", SamplingParams(max_tokens=64)):
            ...
        output = client.generate([{"role": "user", "content": "Hello"}])[0]

A prompt is a text, a list of token ids, or a list of chat messages. Errors are those of jmemserve.errors.
"""

import contextlib
import sys
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jmemserve.errors import InvalidRequest
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc
from jmemserve.server import wire
from jmemserve.server.messages import Delta, Finished, Message, Output, fold
from jmemserve.server.status import error_of
from jmemserve.types import ClusterReport, InstanceLoad, PoolReport, SamplingParams, check_standing, check_text

__all__ = ["AsyncClient", "Client", "Delta", "Finished", "Message", "Output", "Prompt"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
DEFAULT_ADDRESS = "127.0.0.1:50051"
OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The address says where the server is; a proxy for the web, set in the environment, would not find this machine.
    ("grpc.enable_http_proxy", 0),
)


LONGEST_S = 1e9  # a deadline that never comes


def make_request(
    prompt: Prompt,
    params: SamplingParams | None = None,
    request_id: str = "",
    cache_salt: str = "",
    template_arguments: Mapping[str, Any] | None = None,
    *,
    session: str = "",
    tenant: str = "",
    priority: int = 0,
) -> pb.GenerateRequest:
    """The message of a Generate call. Raises InvalidRequest for what has no place in one."""
    check_standing(session, tenant, priority, cache_salt)
    check_text("request_id", request_id)
    request = pb.GenerateRequest(request_id=request_id, cache_salt=cache_salt, session=session, tenant=tenant)
    request.priority = priority
    request.sampling.CopyFrom(wire.params_to_wire(params or SamplingParams()))
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
        request.text = prompt
    elif prompt and all(isinstance(item, Mapping) for item in prompt):
        messages = [item for item in prompt if isinstance(item, Mapping)]
        request.messages.CopyFrom(wire.chat_to_wire(messages, template_arguments))
    else:
        request.token_ids.CopyFrom(wire.tokens_to_wire([_need_int(item) for item in prompt]))
    return request


class Client:
    """A blocking client. Threads may share it. Close it, or use it in a ``with`` statement."""

    def __init__(self, address: str = DEFAULT_ADDRESS):
        self._channel = grpc.insecure_channel(_check_address(address), OPTIONS)
        self._inference, self._control = pb_grpc.InferenceStub(self._channel), pb_grpc.ControlStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every call and the connection."""
        self._channel.close()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        cache_salt: str = "",
        template_arguments: Mapping[str, Any] | None = None,
        session: str = "",
        tenant: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generator[Message]:
        """Yield deltas as they are made and a Finished per output. Closing the generator cancels the request."""
        standing: Any = {"session": session, "tenant": tenant, "priority": priority}
        request = make_request(prompt, params, request_id, cache_salt, template_arguments, **standing)
        with _errors():
            call = self._inference.Generate(request, timeout=_deadline(timeout_s))
            try:
                for response in call:
                    yield wire.message_from_wire(response)
            finally:
                call.cancel()

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **how: Any) -> list[Output]:
        """The whole outputs, ``params.n`` of them. ``how`` as for ``stream``."""
        return fold(self.stream(prompt, params, **how))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The token ids of a text."""
        with _errors():
            request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
            return tuple(self._inference.Tokenize(request).token_ids)

    def detokenize(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ids = wire.tokens_to_wire(tokens).ids
        with _errors():
            request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
            return self._inference.Detokenize(request).text

    def abort(self, request_id: str) -> bool:
        """End a request. Returns whether it was in flight."""
        with _errors():
            return self._control.Abort(pb.AbortRequest(request_id=request_id)).was_in_flight

    def model_info(self) -> pb.GetModelInfoResponse:
        """The served model."""
        with _errors():
            return self._inference.GetModelInfo(pb.GetModelInfoRequest())

    def server_info(self) -> pb.GetServerInfoResponse:
        """The server, its state and its limits."""
        with _errors():
            return self._control.GetServerInfo(pb.GetServerInfoRequest())

    def loads(self) -> list[InstanceLoad]:
        """The load of every instance; empty while loading."""
        with _errors():
            return [wire.load_from_wire(load) for load in self._control.GetLoad(pb.GetLoadRequest()).instances]

    def pools(self) -> list[PoolReport]:
        """The memory pool of every instance; empty while loading."""
        with _errors():
            return [wire.pool_from_wire(pool) for pool in self._control.GetPool(pb.GetPoolRequest()).pools]

    def cluster(self) -> ClusterReport:
        """Who belongs to the cluster, and what has become of those that do not any more."""
        with _errors():
            return wire.cluster_from_wire(self._control.GetCluster(pb.GetClusterRequest()))

    def set_role(self, instance: str, role: str) -> None:
        """Let an instance prefer something else; it keeps its cache."""
        with _errors():
            self._control.SetRole(pb.SetRoleRequest(instance=instance, role=wire.role_to_wire(role)))

    def move(self, request_id: str, instance: str = "") -> list[str]:
        """Let a running request go on at another instance (empty: the best other one); where each output goes."""
        with _errors():
            return list(self._control.Move(pb.MoveRequest(request_id=request_id, instance=instance)).instances)

    def drain_instance(self, instance: str) -> None:
        """Let an instance leave, once what it has goes on elsewhere or is finished."""
        with _errors():
            self._control.DrainInstance(pb.DrainInstanceRequest(instance=instance))

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no request holds."""
        with _errors():
            return self._control.ResetPrefixCache(pb.ResetPrefixCacheRequest()).done

    def is_serving(self, service: str = "") -> bool:
        """Whether health says SERVING; "" and "jmemserve.v1.Inference" mean that Generate is accepted."""
        with _errors():
            answer = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(service=service))
            return answer.status == health_pb2.HealthCheckResponse.SERVING


class AsyncClient:
    """The same for asyncio. ``inference``, ``control`` and ``health`` are the stubs, for what else they can do."""

    def __init__(self, address: str = DEFAULT_ADDRESS):
        self._channel = grpc.aio.insecure_channel(_check_address(address), options=OPTIONS)
        self.inference, self.control = pb_grpc.InferenceStub(self._channel), pb_grpc.ControlStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and the connection."""
        await self._channel.close()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        cache_salt: str = "",
        template_arguments: Mapping[str, Any] | None = None,
        session: str = "",
        tenant: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Message]:
        """Yield deltas as they are made and a Finished per output. Closing the generator cancels the request."""
        standing: Any = {"session": session, "tenant": tenant, "priority": priority}
        request = make_request(prompt, params, request_id, cache_salt, template_arguments, **standing)
        with _errors():
            call = self.inference.Generate(request, timeout=_deadline(timeout_s))
            try:
                async for response in call:
                    yield wire.message_from_wire(response)
            finally:
                call.cancel()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **how: Any) -> list[Output]:
        """The whole outputs, ``params.n`` of them. ``how`` as for ``stream``."""
        async with contextlib.aclosing(self.stream(prompt, params, **how)) as messages:
            return fold([message async for message in messages])

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The token ids of a text."""
        with _errors():
            request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
            return tuple((await self.inference.Tokenize(request)).token_ids)

    async def detokenize(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ids = wire.tokens_to_wire(tokens).ids
        with _errors():
            request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
            return (await self.inference.Detokenize(request)).text

    async def abort(self, request_id: str) -> bool:
        """End a request. Returns whether it was in flight."""
        with _errors():
            return (await self.control.Abort(pb.AbortRequest(request_id=request_id))).was_in_flight

    async def model_info(self) -> pb.GetModelInfoResponse:
        """The served model."""
        with _errors():
            return await self.inference.GetModelInfo(pb.GetModelInfoRequest())

    async def server_info(self) -> pb.GetServerInfoResponse:
        """The server, its state and its limits."""
        with _errors():
            return await self.control.GetServerInfo(pb.GetServerInfoRequest())

    async def loads(self) -> list[InstanceLoad]:
        """The load of every instance; empty while loading."""
        with _errors():
            return [wire.load_from_wire(load) for load in (await self.control.GetLoad(pb.GetLoadRequest())).instances]

    async def cluster(self) -> ClusterReport:
        """Who belongs to the cluster, and what has become of those that do not any more."""
        with _errors():
            return wire.cluster_from_wire(await self.control.GetCluster(pb.GetClusterRequest()))

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix that no request holds."""
        with _errors():
            return (await self.control.ResetPrefixCache(pb.ResetPrefixCacheRequest())).done

    async def is_serving(self, service: str = "") -> bool:
        """Whether health says SERVING; "" and "jmemserve.v1.Inference" mean that Generate is accepted."""
        with _errors():
            answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
            return answer.status == health_pb2.HealthCheckResponse.SERVING


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn a failed call's status into our exceptions."""
    try:
        yield
    except grpc.RpcError as error:
        # Both kinds of clients have these three; the base class of grpc declares none of them.
        code, details, trailers = error.code(), error.details(), error.trailing_metadata()
        raise error_of(code, details or "", [(key, value) for key, value in trailers or ()]) from error


def _deadline(timeout_s: float | None) -> float | None:
    """As gRPC can carry it. Raises InvalidRequest for what is no time."""
    if timeout_s is None:
        return None
    if not timeout_s > 0:
        raise InvalidRequest(f"timeout_s must be seconds above 0, not {timeout_s!r}")
    return min(timeout_s, LONGEST_S)


def _check_address(address: str) -> str:
    """HOST:PORT, or a target in gRPC's own form such as ``unix:`` and ``dns:``. Raises InvalidRequest."""
    host, _, port = address.rpartition(":")
    own_form = address.split(":")[0] in ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "xds", "vsock")
    if not own_form and not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise InvalidRequest(f"the address of a server is HOST:PORT, with a port from 1 to 65535, not {address!r}")
    return address


def _need_int(item: object) -> int:
    if not isinstance(item, int) or isinstance(item, bool):
        raise InvalidRequest(f"a prompt is a text, token ids, or chat messages; it cannot hold {item!r}")
    return item


def main() -> int:
    """The command line: ``python -m jmemserve.client``."""
    from jmemserve.client_cli import main as run  # it imports this module

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
