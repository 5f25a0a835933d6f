"""How many tokens per second the front-end process hands on, from instances to clients, over gRPC both times.

    this process: instances that compute nothing ──News──▶ front-end (a process) ──Generate──▶ clients (a process)

The front-end is the real one. The instance joins as every other does and answers each request with tokens at a steady
pace, all sequences one token per step, as continuous batching does.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grpc.aio
import numpy as np

from jmemserve.config import EngineConfig, Role
from jmemserve.engine.build import model_facts, read_model_config
from jmemserve.scheduler import messages as m
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc
from jmemserve.server.net.secret import load_secret
from jmemserve.server.net.streams import OPTIONS, Stream, dial, prove_as_client
from jmemserve.server.net.words import FROM_INSTANCE, HANDSHAKE, TO_INSTANCE, Apply, Welcome
from jmemserve.types import Event, FinishReason, InstanceLoad, Timings, Usage

PROMPT = 64  # tokens
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """What a process has used of all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Instance:
    """Joins, and gives every sequence a token per step."""

    def __init__(self, address: str, secret: bytes, step_s: float):
        self._address, self._secret, self._step_s = address, secret, step_s
        self._running: dict[str, tuple[int, int]] = {}  # request -> (made, wanted)

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
            stream, _ = dial(channel, "Join")
            await prove_as_client(stream, self._secret)
            engine = EngineConfig()
            facts = model_facts(engine, read_model_config(engine))
            await stream.say(HANDSHAKE.encode(Apply("", 0, Role.COLOCATED, facts, f"relay:{os.getpid()}")))
            welcome = HANDSHAKE.decode(await stream.read())
            assert isinstance(welcome, Welcome), welcome
            ready = m.Ready("127.0.0.1:1", (("kind of blocks", "none"),), 1024)
            stream.put(FROM_INSTANCE.encode(ready))
            stepping = asyncio.ensure_future(self._step(stream, welcome.name))
            try:
                async for raw in stream.messages():
                    message = TO_INSTANCE.decode(raw)
                    if isinstance(message, m.Submit):
                        self._running[message.request.id] = 0, message.request.params.max_tokens or 0
                    elif isinstance(message, m.Abort):
                        self._running.pop(message.request_id, None)
            finally:
                stepping.cancel()

    async def _step(self, stream: Stream, name: str) -> None:
        beat, following = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - beat > 0.5:
                beat = now
                counts = dict.fromkeys([f for f in InstanceLoad.__slots__ if f not in ("instance", "role")], 0)
                stream.put(FROM_INSTANCE.encode(m.Beat(InstanceLoad(name, "colocated", **counts))))
            events = []
            for request_id, (made, wanted) in list(self._running.items()):
                last = made + 1 >= wanted
                usage = Usage(PROMPT, wanted, 0) if last else Usage()
                finish = FinishReason.LENGTH if last else None
                events.append(Event(request_id, (97 + made % 24,), (), finish, usage, Timings(), "", made))
                if last:
                    del self._running[request_id]
                else:
                    self._running[request_id] = made + 1, wanted
            if events:
                stream.put(FROM_INSTANCE.encode(m.News(tuple(events))))
            following = max(following + self._step_s, now)
            await asyncio.sleep(max(0.0, following - time.monotonic()))


async def clients(address: str, streams: int, tokens: int, seconds: float) -> dict[str, object]:
    """So many streams at once, one request after the other; what they saw."""
    first, got, messages, requests = [], 0, 0, 0
    start = time.monotonic()
    limit = start + seconds

    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)

        async def one(number: int) -> None:
            nonlocal got, messages, requests
            while time.monotonic() < limit:
                ids = pb.TokenIds(ids=[(number * 31 + place) % 200 + 5 for place in range(PROMPT)])
                sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
                began, seen = time.monotonic(), False
                async for answer in stub.Generate(pb.GenerateRequest(token_ids=ids, sampling=sampling)):
                    if answer.HasField("delta"):
                        if not seen:
                            seen = True
                            first.append(time.monotonic() - began)
                        got += len(answer.delta.token_ids)
                        messages += 1
                requests += 1

        await asyncio.gather(*(one(number) for number in range(streams)))
    took = time.monotonic() - start
    return {"tokens": got, "messages": messages, "requests": requests, "seconds": took, "first": first}


def measure(streams: int, tokens: int, step_s: float, seconds: float, python: str = sys.executable) -> dict[str, float]:
    """One cell: tokens handed on per second, per second of the front-end's CPU time, and the time to a first token."""
    command = [python, "-m", "jmemserve.serve", "--role", "frontend", "--port", "0"]
    frontend = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert frontend.stdout is not None
        line = frontend.stdout.readline()
        address = line.split("listens on ")[1].split()[0]
        return asyncio.run(_drive(frontend.pid, address, streams, tokens, step_s, seconds, python))
    finally:
        frontend.terminate()
        try:
            frontend.wait(20)
        except subprocess.TimeoutExpired:
            frontend.kill()
            frontend.wait()


async def _drive(
    pid: int, address: str, streams: int, tokens: int, step_s: float, seconds: float, python: str
) -> dict[str, float]:
    instance = asyncio.ensure_future(Instance(address, load_secret(None), step_s).run())
    await _open(address)
    child = await asyncio.create_subprocess_exec(
        python, __file__, address, str(streams), str(tokens), str(seconds), stdout=asyncio.subprocess.PIPE
    )
    used = cpu_seconds(pid)
    out, _ = await child.communicate()
    used = cpu_seconds(pid) - used
    assert instance.done() is False, instance.exception()
    instance.cancel()
    seen = json.loads(out)
    first = np.array(seen["first"]) * 1e3
    return {
        "streams": streams,
        "step_ms": step_s * 1e3,
        "offered_per_s": streams / step_s,
        "tokens_per_s": seen["tokens"] / seen["seconds"],
        "tokens_per_cpu_s": seen["tokens"] / used,
        "tokens_per_message": seen["tokens"] / max(1, seen["messages"]),
        "frontend_cores": used / seen["seconds"],
        "first_token_p50_ms": float(np.percentile(first, 50)),
        "first_token_p99_ms": float(np.percentile(first, 99)),
        "requests": seen["requests"],
    }


async def _open(address: str) -> None:
    """Wait until the front-end serves."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.ControlStub(channel)
        for _ in range(200):
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            if info.state == pb.SERVER_STATE_SERVING:
                return
            await asyncio.sleep(0.1)
    raise AssertionError("the front-end does not serve")


if __name__ == "__main__":
    where, count, wanted, duration = sys.argv[1:]
    print(json.dumps(asyncio.run(clients(where, int(count), int(wanted), float(duration)))))
