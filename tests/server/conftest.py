"""A whole server over a real port, with a cluster that has no model."""

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import fake_cluster
import pytest
import small_text

from jmemserve.client import AsyncClient
from jmemserve.config import ClusterSpec, EngineConfig, parse_mesh
from jmemserve.server.frontend import Frontend
from jmemserve.server.grpc_server import GrpcServer
from jmemserve.server.model import Model, load_model
from jmemserve.server.text import load_text
from jmemserve.types import Request

VOCAB = 320
MAX_LEN = 100


class Server:
    """What a test may look at."""

    def __init__(
        self, frontend: Frontend, grpc: GrpcServer, address: str, cluster: fake_cluster.FakeCluster, model: Model
    ):
        self.frontend, self.grpc, self.address, self.cluster, self.model = frontend, grpc, address, cluster, model

    async def open(self) -> None:
        self.frontend.open(self.cluster, self.model)
        await self.grpc.publish()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = small_text.write_folder(tmp_path)
    return load_model("small", VOCAB, MAX_LEN, folder, load_text(folder))


def count_up(request: Request) -> Iterator[int]:
    """The tokens after the prompt's last, for ever."""
    return ((request.prompt[-1] + i) % VOCAB for i in itertools.count(1))


@contextlib.asynccontextmanager
async def serving(
    model: Model, script: fake_cluster.Script = count_up, opened: bool = True, max_queue: int = 1000
) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """A server and a client of it; nothing may run in the engine when the test is over."""
    frontend = Frontend(ClusterSpec(parse_mesh("prefill+decode:2"), EngineConfig(max_queue=max_queue)))
    grpc = GrpcServer(frontend)
    cluster = fake_cluster.FakeCluster(frontend.on_events, script, max_queue)
    port = await grpc.start("127.0.0.1", 0)
    server = Server(frontend, grpc, f"127.0.0.1:{port}", cluster, model)
    if opened:
        await server.open()
    try:
        async with AsyncClient(server.address) as client:
            yield server, client
    finally:
        await grpc.stop(1)
        cluster.paused.clear()
        await cluster.wait_idle()
        cluster.stop()
        assert frontend.num_calls == 0
