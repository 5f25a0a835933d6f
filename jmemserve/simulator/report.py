"""What a run came to, as plain values and as a table."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jmemserve.simulator.cluster import SimCluster

PERCENTILES = (50, 90, 99)
Row = dict[str, Any]


def summary(cluster: SimCluster) -> Row:
    """The figures of a run; seconds, tokens, and shares of 1. Percentiles are over requests that were served."""
    setting, clock = cluster.setting, cluster.clock
    served = [outcome for outcome in cluster.outcomes if not outcome.error]
    row: Row = {
        "mesh": mesh_of(cluster),
        "devices": sum(spec.model_axis for spec in setting.instances),
        "policy": setting.engine.policy.value,
        "caching": setting.engine.caching.value,
        "requests": len(served),
        "refused": len(cluster.outcomes) - len(served),
        "duration_s": clock.now,
        "output_tokens": sum(outcome.tokens for outcome in served),
        "prompt_tokens": sum(outcome.prompt for outcome in served),
    }
    for name in ("ttft", "tpot", "jct"):
        values = [getattr(o, name) for o in served if name != "tpot" or o.tokens > 1]
        row |= figures(name, values)
    row |= _hits(cluster)
    known = cluster.predictions
    row["false_hits"] = _share(known.over_tokens, known.prompt_tokens)
    row["missed_hits"] = _share(known.under_tokens, known.prompt_tokens)
    row["pulls"] = cluster.pulls
    kinds = {spec.name: spec.role.value for spec in setting.instances}
    row["moved_blocks"] = sum(cluster.network.blocks.values())
    row["transfers"] = cluster.network.transfers
    for (source, destination), blocks in sorted(cluster.network.blocks.items()):
        way = f"blocks_{kinds[source]}_to_{kinds[destination]}"
        row[way] = row.get(way, 0) + blocks
    row["instances"] = [
        {
            "name": name,
            "role": kinds[name],
            "utilisation": _share(instance.device.busy_s, clock.now),
            "steps": instance.steps,
            "computed_tokens": instance.computed,
            "preemptions": instance.scheduler.preemptions,
        }
        for name, instance in cluster.instances.items()
    ]
    for role in dict.fromkeys(kinds.values()):
        own = [i["utilisation"] for i in row["instances"] if i["role"] == role]
        row[f"utilisation_{role}"] = sum(own) / len(own)
    row["preemptions"] = sum(instance["preemptions"] for instance in row["instances"])
    return row


def figures(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean and the percentiles; not a number where there are no values."""
    if not values:
        return {f"{name}_{key}": math.nan for key in ("mean", *(f"p{p}" for p in PERCENTILES))}
    marks = np.percentile(values, PERCENTILES)
    return {f"{name}_mean": float(np.mean(values))} | {
        f"{name}_p{p}": float(mark) for p, mark in zip(PERCENTILES, marks, strict=True)
    }


def mesh_of(cluster: SimCluster) -> str:
    """The instances in the mesh grammar."""
    counts: dict[str, int] = {}
    for spec in cluster.setting.instances:
        axis = f":{spec.model_axis}" if spec.model_axis > 1 else ""
        counts[spec.role.value + axis] = counts.get(spec.role.value + axis, 0) + 1
    return "+".join(f"{count}x{kind}" if count > 1 else kind for kind, count in counts.items())


def _hits(cluster: SimCluster) -> dict[str, float]:
    """The share of the prompts' tokens that was found where they were admitted first, by medium."""
    served = [outcome for outcome in cluster.outcomes if not outcome.error]
    prompts = sum(outcome.prompt for outcome in served)
    stats = [instance.pool.stats() for instance in cluster.instances.values()]
    found, in_dram = sum(s.hit_tokens for s in stats), sum(s.dram_hit_tokens for s in stats)
    rate = _share(sum(outcome.cached for outcome in served), prompts)
    return {
        "hit_rate": rate,
        "hit_rate_dram": rate * _share(in_dram, found),
        "evictions": sum(s.evictions for s in stats),
    }


def plain(value: Any) -> Any:
    """The same for JSON, which knows no NaN."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def table(rows: Sequence[Row]) -> str:
    """One line per run; times in milliseconds."""
    head: tuple[str, ...] = (
        "cluster",
        "policy",
        "caching",
        "served",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "JCT p50",
        "p99",
    )
    head = (*head, "hits", "DRAM", "moved blocks", "busy")
    lines = [head]
    for row in rows:
        times = [f"{1000 * row[f'{name}_p{p}']:,.1f}" for name in ("ttft", "tpot", "jct") for p in (50, 99)]
        busy = "/".join(f"{100 * row[k]:.0f}%" for k in row if k.startswith("utilisation_"))
        unsent = f", {row['unsent']:,} unsent" if row.get("unsent") else ""
        counts = f"{row['requests']:,}" + (f" (-{row['refused']:,}{unsent})" if row["refused"] else "")
        hits = (f"{100 * row['hit_rate']:.1f}%", f"{100 * row['hit_rate_dram']:.1f}%")
        lines.append(
            (row["mesh"], row["policy"], row["caching"], counts, *times, *hits, f"{row['moved_blocks']:,}", busy)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n < 3 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
