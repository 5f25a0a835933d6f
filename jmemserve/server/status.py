"""Exceptions to gRPC statuses and back: the one place that knows which is which."""

import math
from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2

from jmemserve import errors

PUSHBACK = "retry-pushback-ms"  # read by gRPC's own retries, and by our client
_DETAILS = "grpc-status-details-bin"
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
_UNAVAILABLE_RETRY_S = 2.0
_CODES: tuple[tuple[type[errors.JmemserveError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.DuplicateRequest, grpc.StatusCode.ALREADY_EXISTS),
    (errors.UnknownRequest, grpc.StatusCode.NOT_FOUND),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)

Metadata = tuple[tuple[str, str | bytes], ...]


def code_of(error: errors.JmemserveError) -> grpc.StatusCode:
    """The status code of an exception; INTERNAL for what no client should ever see."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def trailers_of(error: errors.JmemserveError) -> Metadata:
    """The trailing metadata of an exception: when to try again, for those that may pass."""
    if isinstance(error, errors.Overloaded):
        delay_s = error.retry_after_s
    elif isinstance(error, errors.Unavailable):
        delay_s = _UNAVAILABLE_RETRY_S
    else:
        return ()
    delay_ms = max(1, math.ceil(delay_s * 1000))
    return ((PUSHBACK, str(delay_ms)), (_DETAILS, _status_details(code_of(error), str(error), delay_ms)))


def error_of(code: grpc.StatusCode, details: str, trailers: Iterable[tuple[str, str | bytes]]) -> errors.JmemserveError:
    """The exception of a status, for clients: the inverse of ``code_of``."""
    details = details or f"the server answered {code.name}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return errors.InvalidRequest(f"the message is too large, shorten the prompt ({details})")  # gRPC's own refusal
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        delay_ms = next((float(value) for key, value in trailers if key == PUSHBACK), 1000.0)
        return errors.Overloaded(details, delay_ms / 1000)
    for kind, own in _CODES:
        if own is code:
            return kind(details)
    return errors.JmemserveError(f"{code.name}: {details}")


def _status_details(code: grpc.StatusCode, message: str, delay_ms: int) -> bytes:
    """A serialized google.rpc.Status {code = 1, message = 2, details = 3} with a RetryInfo {retry_delay = 1}."""
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(delay_ms)
    retry = any_pb2.Any(type_url=_RETRY_INFO, value=_field(1, duration.SerializeToString()))
    number = bytes([1 << 3, code.value[0]])
    return number + _field(2, message.encode()) + _field(3, retry.SerializeToString())


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    size, rest = bytearray(), len(payload)
    while rest > 0x7F:
        size.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([number << 3 | 2]) + bytes(size) + bytes([rest]) + payload
