"""Where the time of a device goes: JAX's profiler around some work, and its events summed up by what they did."""

import collections
import dataclasses
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

MOST = 12  # kinds that are told


@dataclasses.dataclass(frozen=True)
class Kind:
    """Events whose names differ by a number."""

    name: str
    seconds: float
    count: int


def profile(work: Callable[[], object], keep: Path | None = None) -> tuple[float, list[Kind]]:
    """Seconds from the first event to the last, and what took most; ``keep``: where the trace is put, for Perfetto."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            work()
        written = max(Path(folder).rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime).read_bytes()
    if keep is not None:
        keep.write_bytes(written)
    return summed(json.loads(gzip.decompress(written))["traceEvents"])


def summed(events: list[dict]) -> tuple[float, list[Kind]]:
    """Of a device's own streams, if the trace has any, else of whatever thread did an operation of XLA's."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["args"]["name"].startswith("Stream")
        and processes.get(event["pid"], "").startswith("/device:")
    }
    threads: dict[tuple[int, int], list[dict]] = collections.defaultdict(list)
    for event in events:
        place = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and (place in streams if streams else "hlo_op" in event.get("args", {})):
            threads[place].append(event)
    seconds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for own in threads.values():
        for event, alone in zip(own, _alone(own), strict=True):
            name = re.sub(r"([._]\d+)+$", "", event["name"])
            seconds[name] += alone / 1e6
            counts[name] += 1
    every = [event for own in threads.values() for event in own]
    if not every:
        return 0.0, []
    whole = max(event["ts"] + event["dur"] for event in every) - min(event["ts"] for event in every)
    return whole / 1e6, [Kind(name, spent, counts[name]) for name, spent in seconds.most_common()]


def _alone(events: list[dict]) -> list[float]:
    """Of each event of one thread its microseconds less those of events inside it; sorts the events by their start."""
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    alone, open_ones = [event["dur"] for event in events], []
    for number, event in enumerate(events):
        while open_ones and events[open_ones[-1]]["ts"] + events[open_ones[-1]]["dur"] <= event["ts"]:
            open_ones.pop()
        if open_ones:
            alone[open_ones[-1]] -= event["dur"]
        open_ones.append(number)
    return alone


def show(title: str, whole: float, kinds: list[Kind]) -> None:
    """A table, for people."""
    busy = sum(kind.seconds for kind in kinds)
    print(f"\n{title}: {whole * 1e3:.1f} ms, of which {busy * 1e3:.1f} ms of operations, all streams together")
    for kind in kinds[:MOST]:
        print(f"{kind.seconds * 1e3:10.2f} ms {kind.seconds / busy:6.1%} {kind.count:7} x  {kind.name}")
