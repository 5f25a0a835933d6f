"""Latency and throughput of a running server, over gRPC.

    python -m jmemserve.serve &                                     a server, any mesh
    python benchmarks/serve.py --clients 8                          closed loop: 8 clients, each waits for its answer
    python benchmarks/serve.py --rate 4                             open loop: Poisson arrivals, 4 per second
    python benchmarks/serve.py --rate 4 --shared-prefix 256 --output results.json --plot results.png

Prompts are random tokens; the first ``--shared-prefix`` of them are the same for everybody. Times are those of the
client: TTFT to the first token, TPOT per token after it, JCT to the end. The keys of the JSON file are those of
``vllm bench serve`` where it has them; the share of prompt tokens that were cached is always reported.
"""

import argparse
import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import machine
import numpy as np
from tqdm import tqdm

from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(slots=True)
class Answer:
    """What one request cost; times in seconds."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    prompt: int = 0
    tokens: int = 0
    cached: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)

    @property
    def jct(self) -> float:
        return self.last - self.sent


async def ask(stub: pb_grpc.InferenceStub, prompt: list[int], args: argparse.Namespace) -> Answer:
    """Send one request and follow its stream to the end."""
    answer = Answer(time.perf_counter(), prompt=len(prompt))
    sampling = pb.SamplingParams(
        temperature=args.temperature, max_tokens=args.output_tokens, ignore_eos=True, seed=args.seed
    )
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    try:
        async for response in stub.Generate(request, timeout=args.timeout):
            now = time.perf_counter()
            if response.HasField("delta") and response.delta.token_ids:
                answer.first = answer.first or now
                answer.last = now
                answer.tokens += len(response.delta.token_ids)
            elif response.HasField("finished"):
                answer.cached = response.finished.usage.cached_tokens
                answer.error = response.finished.error.message
    except grpc.aio.AioRpcError as error:
        answer.error = f"{error.code().name}: {error.details()}"
    return answer


async def arrivals(args: argparse.Namespace, rng: np.random.Generator) -> AsyncIterator[int]:
    """Numbers of requests, at the times when they are to be sent (open loop)."""
    for number in range(args.requests):
        yield number
        await asyncio.sleep(rng.exponential(1 / args.rate))


async def run(args: argparse.Namespace) -> tuple[list[Answer], float]:
    """All answers and the seconds it took."""
    rng = np.random.default_rng(args.seed)
    options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(args.address, options=options) as channel:
        info = await pb_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=30)
        stub = pb_grpc.InferenceStub(channel)
        shared = rng.integers(3, info.vocab_size, args.shared_prefix).tolist()
        own = args.prompt_tokens - args.shared_prefix
        prompts = [shared + rng.integers(3, info.vocab_size, own).tolist() for _ in range(args.requests)]
        if not args.keep_cache:
            await pb_grpc.ControlStub(channel).ResetPrefixCache(pb.ResetPrefixCacheRequest(), timeout=30)
        bar = tqdm(total=args.requests, unit="req")
        answers: list[Answer] = []

        async def one(number: int) -> None:
            answers.append(await ask(stub, prompts[number], args))
            bar.update(1)

        start = time.perf_counter()
        if args.rate:
            async with asyncio.TaskGroup() as group:
                async for number in arrivals(args, rng):
                    group.create_task(one(number))
        else:
            numbers = iter(range(args.requests))

            async def client() -> None:
                for number in numbers:
                    await one(number)

            async with asyncio.TaskGroup() as group:
                for _ in range(args.clients):
                    group.create_task(client())
        seconds = time.perf_counter() - start
        bar.close()
    return answers, seconds


def summarize(answers: list[Answer], seconds: float, args: argparse.Namespace) -> dict[str, object]:
    """The figures under vLLM's names, times in milliseconds."""
    good = [answer for answer in answers if not answer.error and answer.tokens]
    result: dict[str, object] = {
        **machine.about(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
        "request_throughput": len(good) / seconds,
        "output_throughput": sum(answer.tokens for answer in good) / seconds,
        "total_token_throughput": sum(answer.tokens + answer.prompt for answer in good) / seconds,
        "cached_share_of_prompt": sum(a.cached for a in good) / max(1, sum(a.prompt for a in good)),
    }
    for name in ("ttft", "tpot", "jct"):
        values = np.array([getattr(answer, name) for answer in good]) * 1e3
        if len(values):
            result[f"mean_{name}_ms"] = float(values.mean())
            result |= {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}
    return result


def print_table(result: dict[str, object]) -> None:
    for key in ("device", "cpu", "cores", "jax", "jmemserve", "command"):
        print(f"{key:>12}: {result[key]}")
    print(
        f"{result['completed']} completed, {result['failed']} failed in {result['duration']:.1f} s: "
        f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} output tokens/s, "
        f"{result['cached_share_of_prompt']:.1%} of prompt tokens cached"
    )
    for error in result["errors"]:  # type: ignore[attr-defined]
        print(f"  error: {error}")
    print(f"{'ms':>6} {'mean':>9} " + " ".join(f"{f'P{p}':>9}" for p in PERCENTILES))
    for name in ("ttft", "tpot", "jct"):
        if f"mean_{name}_ms" in result:
            values = [result[f"mean_{name}_ms"], *(result[f"p{p}_{name}_ms"] for p in PERCENTILES)]
            print(f"{name.upper():>6} " + " ".join(f"{value:9.1f}" for value in values))


def plot(answers: list[Answer], path: Path, title: str) -> None:
    """Cumulative distributions of TTFT, TPOT and JCT."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'jmemserve[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, name in zip(axes, ("ttft", "tpot", "jct"), strict=True):
        values = np.sort([getattr(answer, name) * 1e3 for answer in answers if not answer.error])
        axis.step(values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post")
        axis.set(xlabel=f"{name.upper()} (ms)", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--clients", type=int, default=4, help="closed loop with so many clients (default 4)")
    load.add_argument("--rate", type=float, default=0.0, help="open loop: Poisson arrivals per second")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--shared-prefix", type=int, default=0, help="leading tokens that all prompts share")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-cache", action="store_true", help="do not reset the prefix cache first")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw the distributions into this PNG")
    args = parser.parse_args()
    if not 0 <= args.shared_prefix < args.prompt_tokens:
        parser.error("--shared-prefix must be below --prompt-tokens")
    answers, seconds = asyncio.run(run(args))
    result = summarize(answers, seconds, args)
    print_table(result)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        load_text = f"{args.rate:g} requests/s" if args.rate else f"{args.clients} clients"
        plot(answers, args.plot, f"{load_text}, {args.prompt_tokens} + {args.output_tokens} tokens")
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
