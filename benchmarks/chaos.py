"""Kills, pauses and cuts off instances of a running cluster while clients stream from it, and counts what got hurt.

    python benchmarks/chaos.py                                          8 faults on 2 prefill and 2 decode processes
    python benchmarks/chaos.py --kills 200 --mesh 2xprefill+2xdecode --output results/chaos-cpu.json --plot chaos.png

The script starts ``python -m jmemserve.serve --processes per-instance``, asks it for every stream once while nothing
happens (the truth), and then again and again while faults happen: SIGKILL, SIGSTOP for longer than the heartbeat
timeout and then SIGCONT, and the end of all TCP connections of a process that lives on. A fault comes as soon as the
cluster is as large as ``--least`` again. Aims, and the exit code is 1 if one is missed: no stream lost, none with a
changed token, none with a doubled one, no block held at the end, and a median of less than ``--ttft-aim`` seconds to
the first token of a request that is sent right after a kill.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import machine
from chaos_parts.faults import cut_off
from tqdm import tqdm

from jmemserve.client import AsyncClient
from jmemserve.errors import JmemserveError
from jmemserve.server.messages import Delta, Finished
from jmemserve.types import FinishReason, MemberReport, SamplingParams

ACCEPT_S = 60.0  # a stream that the server does not take (UNAVAILABLE, before any token) is offered again for so long
ENGINE = {
    "--max-num-seqs": "4",
    "--max-num-batched-tokens": "64",
    "--kv-cache-tokens": "8192",
    "--max-model-len": "1024",
    "--heartbeat-timeout-s": "3",
}


@dataclasses.dataclass(slots=True)
class Stream:
    """One conversation's request, whose tokens are known."""

    prompt: tuple[int, ...]
    params: SamplingParams
    truth: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True)
class Tally:
    """What was seen."""

    streams: int = 0
    whole: int = 0
    lost: int = 0  # ended with an error, or never
    changed: int = 0
    doubled: int = 0  # more tokens than there are
    refused: int = 0  # not accepted for a while, then accepted
    errors: list[str] = dataclasses.field(default_factory=list)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    ttft_quiet_s: list[float] = dataclasses.field(default_factory=list)
    ttft_after_kill_s: list[float] = dataclasses.field(default_factory=list)
    longest_gap_s: list[float] = dataclasses.field(default_factory=list)  # of each stream during the faults


class Server:
    """The cluster under test, a process of its own with children."""

    def __init__(self, args: argparse.Namespace, log: Path):
        flags = [text for pair in ENGINE.items() for text in pair]
        command = [sys.executable, "-m", "jmemserve.serve", "--processes", "per-instance", "--port", "0"]
        command += ["--mesh", args.mesh, "--model", args.model, "--caching", args.caching, *flags]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.address = ""

    def wait(self, timeout_s: float) -> None:
        """Until it is ready. Raises SystemExit with the end of its log."""
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit and self.process.poll() is None:
            text = self.log.read_text()
            found = re.search(r"listens on (\S+)", text)
            if found and "ready; try" in text:
                self.address = found[1]
                return
            time.sleep(0.2)
        raise SystemExit("the server did not start:\n" + self.log.read_text()[-3000:])

    def stop(self) -> int:
        """Drain it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(10)


def make_streams(args: argparse.Namespace) -> list[Stream]:
    """Conversations that grow, half of them greedy, half sampled."""
    rng = random.Random(args.seed)
    streams = []
    for number in range(args.distinct):
        shared = [rng.randrange(5, 200) for _ in range(rng.choice((0, 16, 48)))] if number % 3 else []
        prompt = tuple(shared + [rng.randrange(5, 200) for _ in range(rng.randrange(8, args.prompt_tokens))])
        length = rng.randrange(args.output_tokens // 2, args.output_tokens)
        how = {"temperature": 0.0} if number % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": number}
        streams.append(Stream(prompt, SamplingParams(max_tokens=length, ignore_eos=True, **how)))
    return streams


async def follow(client: AsyncClient, stream: Stream, tally: Tally) -> tuple[list[int], float, float, str]:
    """(tokens, seconds to the first, longest pause, error) of one stream; offered again while it is not accepted."""
    began = time.monotonic()
    while True:
        tokens: list[int] = []
        first, gap, last = 0.0, 0.0, time.monotonic()
        try:
            async for message in client.stream(stream.prompt, stream.params, timeout_s=300):
                now = time.monotonic()
                if isinstance(message, Delta) and message.tokens:
                    first, gap = first or now, max(gap, now - last)
                    last = now
                    tokens += message.tokens
                elif isinstance(message, Finished) and message.finish is not FinishReason.LENGTH:
                    return tokens, first - began, gap, f"{message.finish.value}: {message.error}"
            return tokens, first - began, gap, ""
        except (JmemserveError, grpc.RpcError) as error:
            if tokens or time.monotonic() - began > ACCEPT_S:
                return tokens, first - began, gap, f"{type(error).__name__}: {error}"
            tally.refused += 1
            await asyncio.sleep(0.2)


def judge(stream: Stream, tokens: list[int], error: str, tally: Tally) -> None:
    """Count one stream that has ended."""
    tally.streams += 1
    truth = list(stream.truth)
    if error or len(tokens) < len(truth):
        tally.lost += 1
        tally.errors.append(error or f"{len(tokens)} of {len(truth)} tokens")
    if len(tokens) > len(truth):
        tally.doubled += 1
    if tokens[: len(truth)] != truth[: len(tokens)]:
        tally.changed += 1
        place = next(n for n, (a, b) in enumerate(zip(tokens, truth, strict=False)) if a != b)
        tally.errors.append(f"token {place} of {len(truth)} is {tokens[place]}, not {truth[place]}")
    tally.whole += tokens == truth and not error


async def keep_streaming(client: AsyncClient, streams: list[Stream], number: int, tally: Tally, over: asyncio.Event):
    """One client: stream after stream until the faults are over."""
    rng = random.Random(number)
    while not over.is_set():
        stream = rng.choice(streams)
        tokens, _, gap, error = await follow(client, stream, tally)
        tally.longest_gap_s.append(gap)
        judge(stream, tokens, error, tally)


async def members(client: AsyncClient, state: str) -> list[MemberReport]:
    """The instances in a state; none if the server does not answer."""
    try:
        return [member for member in (await client.cluster()).members if member.state == state]
    except JmemserveError:
        return []


async def do_fault(kind: str, victim: MemberReport, paused_s: float) -> None:
    """Hurt one instance."""
    pid = int(victim.place.rpartition(":")[2])
    try:
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        elif kind == "pause":
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(paused_s)
            os.kill(pid, signal.SIGCONT)
        else:
            cut_off(pid)
    except ProcessLookupError:
        pass  # it died of the fault before


async def run(args: argparse.Namespace, server: Server) -> tuple[Tally, dict[str, object]]:
    """The whole experiment."""
    rng, tally, streams = random.Random(args.seed), Tally(), make_streams(args)
    over = asyncio.Event()
    async with AsyncClient(server.address) as client:
        for stream in tqdm(streams, desc="truth", unit="stream"):
            tokens, ttft, _, error = await follow(client, stream, tally)
            assert not error, error
            stream.truth = tuple(tokens)
            tally.ttft_quiet_s.append(ttft)
        clients = [
            asyncio.ensure_future(keep_streaming(client, streams, number, tally, over))
            for number in range(args.clients)
        ]
        pauses: list[asyncio.Future[None]] = []
        began = time.monotonic()
        kinds = ["kill"] * args.kills + ["pause"] * args.pauses + ["cut"] * args.cuts
        rng.shuffle(kinds)
        for kind in tqdm(kinds, desc="faults", unit="fault"):
            ready: list[MemberReport] = []
            while len(ready) < args.least:
                await asyncio.sleep(0.1)
                ready = await members(client, "ready")
                if server.process.poll() is not None:
                    raise SystemExit("the server ended:\n" + server.log.read_text()[-3000:])
            await asyncio.sleep(rng.uniform(0.0, args.spread))
            fault = do_fault(kind, rng.choice(ready), paused_s=5.0)
            tally.faults[kind] = tally.faults.get(kind, 0) + 1
            if kind == "pause":
                pauses.append(asyncio.ensure_future(fault))
                continue
            await fault
            if kind == "kill":
                probe = rng.choice(streams)
                tokens, ttft, _, error = await follow(client, probe, tally)
                tally.ttft_after_kill_s.append(ttft)
                judge(probe, tokens, error, tally)
        await asyncio.gather(*pauses)
        over.set()
        await asyncio.gather(*clients)
        seconds = time.monotonic() - began
        leaked = await held_blocks(client)
        report = await client.cluster()
    found = {"seconds": seconds, "leaked_blocks": leaked, "retries": report.retries, "gave_up": report.failed}
    return tally, found


async def held_blocks(client: AsyncClient) -> int:
    """Blocks that are held although nothing runs, once all that ends by a deadline has ended."""
    limit = time.monotonic() + 60
    held = -1
    while held != 0 and time.monotonic() < limit:
        await asyncio.sleep(0.5)
        loads = await client.loads()
        held = sum(load.held_blocks for load in loads) if loads else -1
    return held


def summarize(args: argparse.Namespace, tally: Tally, found: dict[str, object]) -> dict[str, object]:
    """The figures of the run."""
    after = sorted(tally.ttft_after_kill_s)
    gaps = sorted(tally.longest_gap_s)
    return {
        **machine.about(),
        "mesh": args.mesh,
        "model": args.model,
        "caching": args.caching,
        "clients": args.clients,
        "faults": tally.faults,
        "streams": tally.streams,
        "whole": tally.whole,
        "lost": tally.lost,
        "changed": tally.changed,
        "doubled": tally.doubled,
        "offered_again": tally.refused,
        **found,
        "ttft_quiet_median_s": statistics.median(tally.ttft_quiet_s),
        "ttft_after_kill_median_s": statistics.median(after) if after else None,
        "ttft_after_kill_p90_s": after[int(0.9 * (len(after) - 1))] if after else None,
        "ttft_after_kill_max_s": after[-1] if after else None,
        "longest_pause_median_s": statistics.median(gaps) if gaps else None,
        "longest_pause_p99_s": gaps[int(0.99 * (len(gaps) - 1))] if gaps else None,
        "errors": tally.errors[:20],
    }


def missed(args: argparse.Namespace, result: dict[str, object]) -> list[str]:
    """The aims that were missed, in words."""
    found = [f"{result[name]} streams {name}" for name in ("lost", "changed", "doubled") if result[name]]
    if result["leaked_blocks"]:
        found.append(f"{result['leaked_blocks']} blocks leaked")
    median = result["ttft_after_kill_median_s"]
    if isinstance(median, float) and median > args.ttft_aim:
        found.append(f"the median TTFT after a kill is {median:.2f} s, not below {args.ttft_aim:g} s")
    return found


def plot(tally: Tally, path: Path, title: str) -> None:
    """Times to the first token, quiet and after kills, and the longest pause of each stream."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'jmemserve[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for values, label in ((tally.ttft_quiet_s, "quiet"), (tally.ttft_after_kill_s, "right after a kill")):
        if values:
            axes[0].step(
                sorted(values), [n / len(values) for n in range(1, len(values) + 1)], label=label, where="post"
            )
    axes[0].set(xlabel="TTFT (s)", ylabel="share of requests")
    axes[0].legend()
    gaps = sorted(tally.longest_gap_s)
    axes[1].step(gaps, [n / len(gaps) for n in range(1, len(gaps) + 1)], where="post")
    axes[1].set(xlabel="longest pause within a stream (s)", ylabel="share of streams", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="2xprefill+2xdecode")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--caching", default="full")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--pauses", type=int, default=2)
    parser.add_argument("--cuts", type=int, default=2)
    parser.add_argument("--least", type=int, default=2, help="instances that are ready before the next fault")
    parser.add_argument("--spread", type=float, default=1.0, help="a fault comes up to so many seconds later")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--distinct", type=int, default=12, help="different streams")
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--ttft-aim", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw the times into this PNG")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        server = Server(args, args.log or Path(folder) / "server.log")
        try:
            server.wait(300)
            tally, found = asyncio.run(run(args, server))
        finally:
            code = server.stop()
    found["exit_code"] = code
    result = summarize(args, tally, found)
    for name, value in result.items():
        print(f"{name:>26}: {value}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(tally, args.plot, f"{args.mesh}: {sum(tally.faults.values())} faults, {tally.streams} streams")
    if failures := missed(args, result):
        raise SystemExit("missed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
