"""The engine with pages of all layers together or one array per layer: time to a first token, and of a decode step."""

from engine_parts.driver import Driver
from pool_parts.rows import Part, Row, median

from jmemserve.config import BlockLayout, EngineConfig, LoadFormat, Warmup

PREFILL = 512  # tokens, one step
CONTEXT, NEW = 128, 64


def measure(repeats: int, quick: bool, model: str, cache: str | None) -> Part:
    """Milliseconds; the layouts take turns within each repeat, so that a slow minute meets both alike."""
    batches = (1,) if quick else (1, 8, 16)
    drivers = {layout: Driver(_config(layout, model, cache, quick)) for layout in BlockLayout}
    prefills: dict[BlockLayout, list[float]] = {layout: [] for layout in BlockLayout}
    steps: dict[tuple[BlockLayout, int], list[float]] = {(layout, b): [] for layout in BlockLayout for b in batches}
    for _ in range(repeats):
        for layout, driver in drivers.items():
            began, times, _ = driver.run([driver.prompt(PREFILL)], 1)
            prefills[layout].append(times[0][0] - began)
            for batch in batches:
                _, times, _ = driver.run([driver.prompt(CONTEXT) for _ in range(batch)], NEW)
                begin, last = max(t[0] for t in times), min(t[-1] for t in times)
                tokens = sum(begin < at <= last for t in times for at in t)
                steps[layout, batch].append((last - begin) * batch / tokens)
    for driver in drivers.values():
        driver.cluster.stop()
    rows: list[Row] = [_row("prefill", PREFILL, {layout: median(prefills[layout]) for layout in BlockLayout})]
    rows += [
        _row("decode step", batch, {layout: median(steps[layout, batch]) for layout in BlockLayout})
        for batch in batches
    ]
    return Part({f"engine, {model}": rows})


def _row(what: str, size: int, times: dict[BlockLayout, float]) -> Row:
    figures = {f"{layout.value}_ms": 1e3 * times[layout] for layout in BlockLayout}
    ratio = times[BlockLayout.DISCRETE] / times[BlockLayout.AGGREGATED]
    return {"what": what, "size": size, **figures, "discrete_over_aggregated": ratio}


def _config(layout: BlockLayout, model: str, cache: str | None, quick: bool) -> EngineConfig:
    return EngineConfig(
        model=model,
        load_format=LoadFormat.DUMMY,
        dtype="float32",
        max_model_len=1024,
        kv_cache_tokens=8192,
        max_num_seqs=16,
        max_num_batched_tokens=PREFILL,
        block_layout=layout,
        warmup=Warmup.FAST if quick else Warmup.FULL,
        compilation_cache_dir=cache,
    )
