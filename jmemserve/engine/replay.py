"""One instance on the devices of several processes: followers repeat what the leader does.

    leader: Instance ── launch, gather, scatter ──> Recorder ── messages ──> follower: repeat the same calls
                 └────────> its own devices                                       └────────> its own devices

Programs with collectives must be enqueued by every process in the same order. All processes build the same parts
(``engine/build.py``: the same weights, pages and programs, in the same order); then only the leader decides. Every
step and every read or write of blocks is sent before the leader enqueues it itself, with all the host's bytes that it
needs. A follower has no scheduler, no pool and no arena, and reads nothing: what it repeats does not depend on it.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jmemserve.config import ClusterSpec
from jmemserve.engine import garbage
from jmemserve.engine.build import build, model_folder, read_model_config
from jmemserve.engine.channel import Follower, Leader, Message
from jmemserve.engine.compiles import CompileCounter, keep_compilations
from jmemserve.engine.orders import Order
from jmemserve.engine.report import Report
from jmemserve.engine.runner import Runner
from jmemserve.errors import TransferError
from jmemserve.kvpool.store import SpanningStore
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler.plan import StepShape

IN_FLIGHT = 4  # steps that a follower enqueues before it waits for the first of them


def fingerprint(spec: ClusterSpec) -> str:
    """Equal in processes that build the same: flags, the model's config, and releases. Raises ConfigError."""
    engine = dataclasses.replace(spec.engine, model="", compilation_cache_dir=None)  # may lie elsewhere on each host
    config = (model_folder(spec.engine) / "config.json").read_bytes()
    instances = [(instance.role, instance.model_axis) for instance in spec.instances]
    text = repr((engine, instances, jax.__version__, jax.default_backend(), len(jax.local_devices())))
    return f"jax {jax.__version__}, {hashlib.sha256(text.encode() + config).hexdigest()[:12]}"


def lead(runner: Runner, leader: Leader) -> None:
    """From now on whatever ``runner`` and its store enqueue is repeated by the followers, which must have built too."""
    assert isinstance(runner.store, SpanningStore), "the mesh is of one process"

    def step(order: Order) -> None:
        arrays = (order.ints, *(order.penalties or ()), *(order.draw or ()))
        about = (len(order.penalties or ()), len(order.draw or ()), order.describe)
        leader.send(Message("step", (*dataclasses.astuple(order.shape), *about), arrays))

    def move(name: str, numbers: Sequence[int], more: tuple[int, ...], blocks: np.ndarray | None) -> None:
        values = (tuple(int(number) for number in numbers), *(int(value) for value in more))
        leader.send(Message(name, values, () if blocks is None else (blocks,)))

    runner.record, runner.store.record, runner.leads = step, move, True


def follow(runner: Runner, messages: Iterable[Message]) -> None:
    """Do what the leader does until it stops. Raises whatever the devices raise."""
    store, flights = runner.store, deque[jax.Array]()
    for message in messages:
        values, arrays = message.values, message.arrays
        match message.name:
            case "step":
                tokens, _ = runner.enqueue(_order(values, arrays))
                flights.append(tokens)
                if len(flights) > IN_FLIGHT:
                    flights.popleft().block_until_ready()  # an error of a device shows here, and not never
            case "gather":
                store.gather(*values)
            case "scatter":
                store.scatter(*values, *arrays)
            case "gather_part":
                store.gather_part(*values)
            case "scatter_part":
                store.scatter_part(*values, *arrays)
            case _:
                raise TransferError(f"the leader sent {message.name!r}, which is nothing to do")
    jax.block_until_ready(store.pages)


def run_follower(spec: ClusterSpec, follower: Follower, report: Report) -> None:
    """Build what the leader builds and follow it. Raises ConfigError, CheckpointError, or what the devices raise."""
    engine = spec.engine
    config = read_model_config(engine)
    if engine.compilation_cache_dir is not None:
        keep_compilations(engine.compilation_cache_dir)
    parts = build(spec.instances[0], engine, config, spec.num_devices, 0, LocalExchange(), report)
    counter = CompileCounter()
    garbage.settle()
    report.line("follows process 0")
    follow(parts.runner, follower.messages())
    report.line(f"stopped; {counter.count} programs were compiled after the start")
    counter.close()
    follower.close()


def _order(values: tuple, arrays: tuple[np.ndarray, ...]) -> Order:
    tokens, seqs, num_penalties, num_draw, describe = values
    ints, *rest = arrays
    penalties, draw = tuple(rest[:num_penalties]), tuple(rest[num_penalties:])
    assert len(draw) == num_draw, (values, len(arrays))
    return Order(StepShape(tokens, seqs), ints, penalties or None, draw or None, describe)
