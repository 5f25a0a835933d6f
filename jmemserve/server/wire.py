"""Protobuf messages to values and back. Pure; both the server and the client use it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import json_format

from jmemserve.config import InstanceSpec, Role
from jmemserve.errors import InvalidRequest, JmemserveError, Overloaded, Unavailable
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server.generation import EngineError, is_retryable
from jmemserve.server.messages import Delta, Finished, Message
from jmemserve.types import (
    ClusterReport,
    FinishReason,
    HostTimes,
    InstanceLoad,
    MediumReport,
    MemberReport,
    PoolReport,
    SamplingParams,
    Timings,
    TokenLogprobs,
    Usage,
    check_text,
)

MAX_ID_LENGTH = 256  # characters
_SCALARS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "min_tokens", "ignore_eos", "logprobs", "n"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
_ROLES = {
    Role.PREFILL: pb.INSTANCE_ROLE_PREFILL,
    Role.DECODE: pb.INSTANCE_ROLE_DECODE,
    Role.COLOCATED: pb.INSTANCE_ROLE_COLOCATED,
}
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}
_TIMINGS = ("queue_s", "prefill_s", "transfer_s", "first_token_s", "decode_s")
_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")
_LOAD_NUMBERS = (
    *("running", "waiting", "leaving", "free_blocks", "cached_blocks", "held_blocks", "total_blocks"),
    *("prefix_hits", "prefix_queries", "steps", "preemptions", "compiles_after_warmup", "cost_error"),
)

_HOST_NUMBERS = ("plan_s", "arrays_s", "dispatch_s", "commit_s", "gap_s", "starved")
_MEMBER_FIELDS = ("name", "epoch", "place", "address", "since_s", "heard_s", "reason", "profile")
_CLUSTER_NUMBERS = (
    *("requests", "retries", "moves", "failed", "pulls", "prompt_tokens", "predicted_tokens", "cached_tokens"),
    *("over_tokens", "under_tokens", "tree_blocks", "tree_renewals"),
)
_POOL_NUMBERS = (
    *("query_tokens", "hit_tokens", "dram_hit_tokens", "evictions", "swapped_out", "swapped_in", "prefix_blocks"),
    *("runs", "transfers_out", "transfers_in", "transfer_calls", "network_calls", "bytes_out", "bytes_in", "dropped"),
    *("corrupt", "expired_leases", "failed_transfers", "swaps", "last_event"),
)


def params_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """The parameters of a request; what is not set has its default. Values are not checked yet."""
    values = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids), **values)


def params_to_wire(params: SamplingParams) -> pb.SamplingParams:
    """The message of ``params``. Raises InvalidRequest if a number does not even fit its field."""
    values = {name: value for name in _SCALARS if (value := getattr(params, name)) is not None}
    try:
        return pb.SamplingParams(stop=params.stop, stop_token_ids=params.stop_token_ids, **values)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the sampling parameters cannot be sent: {error}") from None


def chat_from_wire(chat: pb.Chat) -> tuple[list[dict[str, str]], bool, dict[str, Any]]:
    """Messages, whether to open the assistant's answer, and further template variables."""
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return messages, prompt, json_format.MessageToDict(chat.template_arguments)


def chat_to_wire(messages: Iterable[Mapping[str, str]], arguments: Mapping[str, Any] | None = None) -> pb.Chat:
    """The message of a conversation. Raises InvalidRequest if an entry is not a role and a content."""
    chat = pb.Chat()
    for message in messages:
        if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            raise InvalidRequest(f"a message has a role and a content, both text; this one is {dict(message)!r}")
        for name, text in message.items():
            check_text(f"the {name} of a message", text)
        chat.messages.add(role=message["role"], content=message["content"])
    if arguments:
        chat.template_arguments.update(dict(arguments))
    return chat


def tokens_to_wire(tokens: Sequence[int]) -> pb.TokenIds:
    """The message of token ids. Raises InvalidRequest if one is no 32-bit count."""
    try:
        return pb.TokenIds(ids=tokens)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"token ids must be whole numbers from 0: {error}") from None


def check_id(request_id: str) -> None:
    """Raise InvalidRequest if an id is too long to be kept and logged."""
    if len(request_id) > MAX_ID_LENGTH:
        raise InvalidRequest(f"request_id may have {MAX_ID_LENGTH} characters, not {len(request_id)}")


def message_to_wire(message: Message) -> pb.GenerateResponse:
    """A delta or an end, as it is streamed."""
    if isinstance(message, Delta):
        logprobs = [
            pb.TokenLogprobs(
                token_id=entry.token,
                logprob=entry.logprob,
                rank=entry.rank,
                top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
            )
            for entry in message.logprobs
        ]
        delta = pb.Delta(index=message.index, token_ids=message.tokens, text=message.text, logprobs=logprobs)
        return pb.GenerateResponse(request_id=message.request_id, delta=delta)
    finished = pb.Finished(
        index=message.index,
        finish_reason=_FINISH[message.finish],
        matched_stop=message.matched_stop,
        usage=pb.Usage(**{name: getattr(message.usage, name) for name in _USAGE}),
        timings=pb.Timings(**{name: getattr(message.timings, name) for name in _TIMINGS}),
        error=None if message.error is None else _error_to_wire(message.error),
    )
    return pb.GenerateResponse(request_id=message.request_id, finished=finished)


def message_from_wire(response: pb.GenerateResponse) -> Message:
    """The inverse of ``message_to_wire``."""
    if response.HasField("delta"):
        delta = response.delta
        logprobs = tuple(
            TokenLogprobs(
                entry.token_id, entry.logprob, entry.rank, tuple((top.token_id, top.logprob) for top in entry.top)
            )
            for entry in delta.logprobs
        )
        return Delta(response.request_id, delta.index, tuple(delta.token_ids), delta.text, logprobs)
    finished = response.finished
    return Finished(
        response.request_id,
        finished.index,
        _FINISH_BACK.get(finished.finish_reason, FinishReason.ERROR),
        finished.matched_stop if finished.HasField("matched_stop") else None,
        Usage(**{name: getattr(finished.usage, name) for name in _USAGE}),
        Timings(**{name: getattr(finished.timings, name) for name in _TIMINGS}),
        _error_from_wire(finished.error) if finished.HasField("error") else None,
    )


def instance_to_wire(spec: InstanceSpec) -> pb.Instance:
    """The description of an instance."""
    return pb.Instance(
        name=spec.name, role=_ROLES[spec.role], model_axis=spec.model_axis, first_device=spec.first_device
    )


def load_to_wire(load: InstanceLoad) -> pb.InstanceLoad:
    """The load of an instance."""
    numbers = {name: getattr(load, name) for name in _LOAD_NUMBERS}
    host = pb.HostTimes(**{name: getattr(load.host, name) for name in _HOST_NUMBERS})
    return pb.InstanceLoad(instance=load.instance, role=_ROLES[Role(load.role)], host=host, **numbers)


def load_from_wire(load: pb.InstanceLoad) -> InstanceLoad:
    """The inverse of ``load_to_wire``."""
    role = {number: role.value for role, number in _ROLES.items()}.get(load.role, "unknown")
    host = HostTimes(**{name: getattr(load.host, name) for name in _HOST_NUMBERS})
    return InstanceLoad(load.instance, role, **{name: getattr(load, name) for name in _LOAD_NUMBERS}, host=host)


def role_from_wire(role: pb.InstanceRole) -> Role:
    """The role. Raises InvalidRequest if it is none."""
    found = {number: known for known, number in _ROLES.items()}.get(role)
    if found is None:
        raise InvalidRequest("role is not set; it must be PREFILL, DECODE or COLOCATED")
    return found


def role_to_wire(role: str) -> pb.InstanceRole:
    """The number of a role. Raises InvalidRequest if it is none."""
    try:
        return _ROLES[Role(role)]
    except ValueError:
        raise InvalidRequest(f"a role is prefill, decode or colocated, not {role!r}") from None


def cluster_to_wire(cluster: ClusterReport) -> pb.GetClusterResponse:
    """The report of a cluster."""
    members = [
        pb.Member(
            role=_ROLES[Role(member.role)],
            state=f"MEMBER_STATE_{member.state.upper()}",
            load=None if member.load is None else load_to_wire(member.load),
            peers=[pb.PoolPeer(instance=name, transport=way) for name, way in member.peers],
            **{name: getattr(member, name) for name in _MEMBER_FIELDS},
        )
        for member in cluster.members
    ]
    counts = {name: getattr(cluster, name) for name in _CLUSTER_NUMBERS}
    return pb.GetClusterResponse(members=members, **counts)


def cluster_from_wire(cluster: pb.GetClusterResponse) -> ClusterReport:
    """The inverse of ``cluster_to_wire``."""
    roles = {number: role.value for role, number in _ROLES.items()}
    members = tuple(
        MemberReport(
            role=roles.get(member.role, "unknown"),
            state=pb.MemberState.Name(member.state).removeprefix("MEMBER_STATE_").lower(),
            load=load_from_wire(member.load) if member.HasField("load") else None,
            peers=tuple((peer.instance, peer.transport) for peer in member.peers),
            **{name: getattr(member, name) for name in _MEMBER_FIELDS},
        )
        for member in cluster.members
    )
    return ClusterReport(members, **{name: getattr(cluster, name) for name in _CLUSTER_NUMBERS})


def pool_to_wire(pool: PoolReport) -> pb.PoolReport:
    """The report of a pool."""
    return pb.PoolReport(
        instance=pool.instance,
        media=[pb.MediumReport(**dataclasses.asdict(medium)) for medium in pool.media],
        peers=[pb.PoolPeer(instance=name, transport=way) for name, way in pool.peers],
        leases=[pb.PoolLease(instance=name, blocks=blocks, seconds_left=left) for name, blocks, left in pool.leases],
        oldest=[pb.OldPrefix(seconds=seconds, blocks=blocks) for seconds, blocks in pool.oldest],
        **{name: getattr(pool, name) for name in _POOL_NUMBERS},
    )


def pool_from_wire(pool: pb.PoolReport) -> PoolReport:
    """The inverse of ``pool_to_wire``."""
    sizes = ("capacity", "free", "held", "cached", "bytes")
    return PoolReport(
        pool.instance,
        tuple(MediumReport(m.medium, **{name: getattr(m, name) for name in sizes}) for m in pool.media),
        peers=tuple((peer.instance, peer.transport) for peer in pool.peers),
        leases=tuple((lease.instance, lease.blocks, lease.seconds_left) for lease in pool.leases),
        oldest=tuple((prefix.seconds, prefix.blocks) for prefix in pool.oldest),
        **{name: getattr(pool, name) for name in _POOL_NUMBERS},
    )


def _error_to_wire(error: JmemserveError) -> pb.Error:
    code = pb.ERROR_CODE_INTERNAL
    if isinstance(error, Overloaded):
        code = pb.ERROR_CODE_OVERLOADED
    elif isinstance(error, Unavailable):
        code = pb.ERROR_CODE_UNAVAILABLE
    elif isinstance(error, InvalidRequest):
        code = pb.ERROR_CODE_INVALID_REQUEST
    return pb.Error(code=code, message=str(error), retryable=is_retryable(error))


def _error_from_wire(error: pb.Error) -> JmemserveError:
    kinds: dict[int, type[JmemserveError]] = {
        pb.ERROR_CODE_OVERLOADED: Overloaded,
        pb.ERROR_CODE_UNAVAILABLE: Unavailable,
        pb.ERROR_CODE_INVALID_REQUEST: InvalidRequest,
    }
    return kinds.get(error.code, EngineError)(error.message)
