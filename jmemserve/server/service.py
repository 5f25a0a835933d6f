"""The gRPC services: one message in, the front-end's answer out. Every exception becomes a status in one place."""

import asyncio
import contextlib
import functools
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable

import grpc
from grpc.aio import ServicerContext

import jmemserve
from jmemserve.errors import DeadlineExceeded, InvalidRequest, JmemserveError
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc
from jmemserve.server import wire
from jmemserve.server.frontend import Frontend, State
from jmemserve.server.generation import Generation
from jmemserve.server.model import Model
from jmemserve.server.status import code_of, trailers_of
from jmemserve.types import check_standing

MAX_REQUEST_BYTES = 16 << 20
_LONG_TEXT = 2048  # characters: longer texts are tokenised off the loop
_STATES = {
    State.LOADING: pb.SERVER_STATE_LOADING,
    State.SERVING: pb.SERVER_STATE_SERVING,
    State.DRAINING: pb.SERVER_STATE_DRAINING,
    State.FAILED: pb.SERVER_STATE_FAILED,
}
_log = logging.getLogger(__name__)


def _statuses[S, Q, R](method: Callable[[S, Q, ServicerContext], Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    """Turn our exceptions into statuses with a sentence; a bug becomes INTERNAL and a traceback in the log."""

    @functools.wraps(method)
    async def wrapper(self: S, request: Q, context: ServicerContext) -> R:
        try:
            return await method(self, request, context)
        except JmemserveError as error:
            await context.abort(code_of(error), str(error), trailers_of(error))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            _log.error("a call failed:\n%s", traceback.format_exc())
            await context.abort(grpc.StatusCode.INTERNAL, f"a bug in the server: {type(error).__name__}; see its log")
        raise AssertionError("abort() does not return")

    return wrapper


async def _encode[T](size: int, encode: Callable[[], T]) -> T:
    """Run ``encode``, on another thread if ``size`` characters would hold up every other stream."""
    return encode() if size <= _LONG_TEXT else await asyncio.to_thread(encode)


async def _encode_chat(model: Model, chat: pb.Chat) -> tuple[int, ...]:
    size = sum(len(message.content) for message in chat.messages)
    return await _encode(size, functools.partial(model.encode_chat, *wire.chat_from_wire(chat)))


class InferenceService(pb_grpc.InferenceServicer):
    """What applications call."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend

    @_statuses
    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        arrival = time.monotonic()
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else arrival + remaining_s
        with self._frontend.admit():
            generation = await self._prepare(request, arrival, deadline)
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded("the deadline passed before the request could begin")
            # Cancelling the call, by the client or by its deadline, cancels this coroutine; closing the iterator then
            # aborts what is left in the engine.
            async with contextlib.aclosing(self._frontend.generate(generation)) as turns:
                async for messages in turns:
                    for message in messages:
                        await context.write(wire.message_to_wire(message))

    async def _prepare(self, request: pb.GenerateRequest, arrival: float, deadline: float | None) -> Generation:
        model = self._frontend.model
        model.check_name(request.model)
        wire.check_id(request.request_id)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("no prompt; set text, token_ids or messages")
        params = wire.params_from_wire(request.sampling)
        model.check_params(params)  # before the work of tokenising
        check_standing(request.session, request.tenant, request.priority, request.cache_salt)
        if kind == "token_ids":
            prompt = tuple(request.token_ids.ids)
        elif kind == "messages":
            prompt = await _encode_chat(model, request.messages)
        else:
            # An empty text has no tokens of its own; that a tokenizer would add one makes it no prompt.
            if not request.text:
                raise InvalidRequest("the prompt is empty; send some text")
            prompt = await _encode(len(request.text), functools.partial(model.encode_text, request.text))
        return Generation(
            model,
            request.request_id or uuid.uuid4().hex,
            prompt,
            params,
            self._frontend.draw_seed(),
            request.cache_salt,
            arrival,
            deadline,
            session=request.session,
            tenant=request.tenant,
            priority=request.priority,
        )

    @_statuses
    async def Tokenize(self, request: pb.TokenizeRequest, context: ServicerContext) -> pb.TokenizeResponse:
        model = self._frontend.model
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("nothing to tokenise; set text or messages")
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        with self._frontend.admit():
            if kind == "messages":
                return pb.TokenizeResponse(token_ids=await _encode_chat(model, request.messages))
            encode = functools.partial(model.encode_text, request.text, special)
            return pb.TokenizeResponse(token_ids=await _encode(len(request.text), encode))

    @_statuses
    async def Detokenize(self, request: pb.DetokenizeRequest, context: ServicerContext) -> pb.DetokenizeResponse:
        model = self._frontend.model
        model.check_tokens(request.token_ids)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        decode = functools.partial(model.need_text().decode, request.token_ids, skip)
        with self._frontend.admit():
            return pb.DetokenizeResponse(text=await _encode(len(request.token_ids), decode))

    @_statuses
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: ServicerContext) -> pb.GetModelInfoResponse:
        model = self._frontend.model
        return pb.GetModelInfoResponse(
            name=model.name,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=sorted(model.eos_ids),
            has_tokenizer=model.text is not None,
            has_chat_template=model.text is not None and model.text.has_chat_template,
        )


class ControlService(pb_grpc.ControlServicer):
    """What operators call."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self._server_id = uuid.uuid4().hex
        self._start = time.monotonic()

    @_statuses
    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        if not request.request_id:
            raise InvalidRequest("request_id is empty; send the id of the request to abort")
        return pb.AbortResponse(was_in_flight=self._frontend.abort(request.request_id))

    @_statuses
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: ServicerContext
    ) -> pb.GetServerInfoResponse:
        spec = self._frontend.spec
        return pb.GetServerInfoResponse(
            version=jmemserve.__version__,
            server_id=self._server_id,
            state=_STATES[self._frontend.state],
            uptime_s=time.monotonic() - self._start,
            instances=[wire.instance_to_wire(instance) for instance in spec.instances],
            block_size=spec.engine.block_size,
            max_queue=spec.engine.max_queue,
            max_request_bytes=MAX_REQUEST_BYTES,
        )

    @_statuses
    async def GetLoad(self, request: pb.GetLoadRequest, context: ServicerContext) -> pb.GetLoadResponse:
        loads = [wire.load_to_wire(load) for load in self._frontend.loads()]
        return pb.GetLoadResponse(instances=loads, calls=self._frontend.num_calls)

    @_statuses
    async def GetPool(self, request: pb.GetPoolRequest, context: ServicerContext) -> pb.GetPoolResponse:
        return pb.GetPoolResponse(pools=[wire.pool_to_wire(pool) for pool in await self._frontend.pools()])

    @_statuses
    async def GetCluster(self, request: pb.GetClusterRequest, context: ServicerContext) -> pb.GetClusterResponse:
        return wire.cluster_to_wire(self._frontend.cluster())

    @_statuses
    async def SetRole(self, request: pb.SetRoleRequest, context: ServicerContext) -> pb.SetRoleResponse:
        self._frontend.set_role(request.instance, wire.role_from_wire(request.role))
        return pb.SetRoleResponse()

    @_statuses
    async def Move(self, request: pb.MoveRequest, context: ServicerContext) -> pb.MoveResponse:
        return pb.MoveResponse(instances=self._frontend.move(request.request_id, request.instance))

    @_statuses
    async def DrainInstance(
        self, request: pb.DrainInstanceRequest, context: ServicerContext
    ) -> pb.DrainInstanceResponse:
        self._frontend.drain_instance(request.instance)
        return pb.DrainInstanceResponse()

    @_statuses
    async def ResetPrefixCache(
        self, request: pb.ResetPrefixCacheRequest, context: ServicerContext
    ) -> pb.ResetPrefixCacheResponse:
        return pb.ResetPrefixCacheResponse(done=await self._frontend.reset_prefix_cache())
