"""What a person sees of an instance and its pool."""

import dataclasses
import time

from jmemserve.config import Role
from jmemserve.engine.compiles import CompileCounter
from jmemserve.kvpool.node import PoolNode
from jmemserve.scheduler.local import LocalScheduler
from jmemserve.types import HostTimes, InstanceLoad, MediumReport, PoolReport

OLDEST = 5  # prefixes shown


def load_report(
    name: str,
    role: Role,
    scheduler: LocalScheduler,
    steps: int,
    compiles: CompileCounter,
    cost_error: float,
    host: HostTimes,
) -> InstanceLoad:
    """A momentary view, from any thread."""
    stats = scheduler.pool.stats()
    return InstanceLoad(
        instance=name,
        role=role.value,
        running=len(scheduler.running) + len(scheduler.loading),
        waiting=len(scheduler.waiting),
        leaving=len(scheduler.leaving),
        free_blocks=stats.hbm.free,
        cached_blocks=stats.hbm.cached,
        held_blocks=stats.hbm.held + stats.dram.held,
        total_blocks=stats.hbm.capacity,
        prefix_hits=stats.hit_tokens,
        prefix_queries=stats.query_tokens,
        steps=steps,
        preemptions=scheduler.preemptions,
        compiles_after_warmup=compiles.count,
        cost_error=cost_error,
        host=host,
    )


def pool_report(node: PoolNode) -> PoolReport:
    """Everything about a node; to be called on its owner's thread."""
    now = time.monotonic()
    pool, moved = node.blocks.stats(), dataclasses.asdict(node.stats())
    per_block = node.store.layout.bytes_per_block
    media = tuple(
        MediumReport(name, stats.capacity, stats.free, stats.held, stats.cached, stats.capacity * per_block)
        for name, stats in (("HBM", pool.hbm), ("DRAM", pool.dram))
        if stats.capacity
    )
    moved.pop("staged_bytes")
    moved["failed_transfers"] = moved.pop("failed")
    log = node.blocks.log
    return PoolReport(
        node.blocks.instance,
        media,
        query_tokens=pool.query_tokens,
        hit_tokens=pool.hit_tokens,
        dram_hit_tokens=pool.dram_hit_tokens,
        evictions=pool.evictions,
        swapped_out=pool.swapped_out,
        swapped_in=pool.swapped_in,
        prefix_blocks=pool.prefix_blocks,
        runs=pool.runs,
        last_event=log.last if log is not None else 0,
        peers=tuple(node.peers.names().items()),
        leases=tuple(node.remote.leases(now)),
        oldest=tuple(node.blocks.oldest(OLDEST, now)),
        **moved,
    )
