"""The clients of the relay's benchmark: ADDRESS STREAMS TOKENS SECONDS; prints what they saw as JSON."""

import asyncio
import json
import sys
import time

import grpc.aio

from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc

PROMPT = 64  # tokens


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


if __name__ == "__main__":
    where, count, wanted, duration = sys.argv[1:]
    print(json.dumps(asyncio.run(clients(where, int(count), int(wanted), float(duration)))))
