"""The gRPC server: services, health and reflection on one port, and the channel options of both ends."""

import asyncio
import socket
import time
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from jmemserve.errors import Unavailable
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc
from jmemserve.server.frontend import Frontend, State
from jmemserve.server.service import MAX_REQUEST_BYTES, ControlService, InferenceService

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = pb.DESCRIPTOR.services_by_name["Control"].full_name
MAX_RESPONSE_BYTES = 64 << 20
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # Clients may ping idle connections, as proxies want; the default punishes them with "too many pings".
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Another server on the same port is an error, not a partner.
    ("grpc.so_reuseport", 0),
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


LAST_WORDS_S = 0.5  # for the status of a stream whose messages are all sent


class GrpcServer:
    """Listens from ``start`` to ``stop``. ``publish`` tells health what the front-end's state is."""

    def __init__(self, frontend: Frontend, more: Sequence[grpc.GenericRpcHandler] = ()):
        """``more``: handlers on the same port that are not for applications."""
        self._frontend = frontend
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        pb_grpc.add_InferenceServicer_to_server(InferenceService(frontend), self._server)
        pb_grpc.add_ControlServicer_to_server(ControlService(frontend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers(tuple(more))
        names = (INFERENCE, CONTROL, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Open the port (0: any free one) and return it. Raises Unavailable if it cannot be had."""
        _check_address(host, port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {address}: {error}") from error
        await self.publish()
        await self._server.start()
        return bound

    async def publish(self) -> None:
        """Make health say what the front-end's state is, also to those who watch."""
        ready = _SERVING if self._frontend.state is State.SERVING else _NOT_SERVING
        await self._health.set("", ready)
        await self._health.set(INFERENCE, ready)
        await self._health.set(CONTROL, _SERVING)

    async def stop(self, grace_s: float) -> None:
        """Give calls ``grace_s`` to end, then cancel them and those who watch health, and close the port."""
        limit = time.monotonic() + grace_s
        while self._frontend.num_calls and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        await self._server.stop(min(grace_s, LAST_WORDS_S))


def _check_address(host: str, port: int) -> None:
    """Raise Unavailable, in words, if the address cannot be had; gRPC itself would write lines of its own first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Unavailable(f"cannot listen on {host} port {port}: {reason}; try another --host or --port") from error
