"""Large blocks and small ones: a prompt's keys and values sent in pieces of different size (paper 7.5.3)."""

import dataclasses

from pool_parts.rows import Aim, Part, Row, median, seconds
from pool_parts.worlds import Pair, Shape, Ways

from jmemserve.errors import TransferError
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import Granularity, Medium

SMALL = PageLayout(12, 1, 16, 64, "float32")  # 4 KiB per layer and half
STREAMS = (1, 2, 4)  # transfers at once, the prompt divided among them
CUTS = {  # name: (pages of all layers together, how the bytes are cut)
    "by_request": (False, Granularity.BY_REQUEST),
    "by_layer": (False, Granularity.BY_LAYER),
    "by_request_agg": (True, Granularity.BY_REQUEST_AGG),
}
PAPER_MS = {"by_request": {1: 102, 2: 60.4, 4: 46.6}, "by_request_agg": {1: 19.4, 2: 19.3, 4: 19.2}}  # 1T1C 2T2C 4T4C
AIM = 3.0


def measure(repeats: int, quick: bool, ways: Ways, names: tuple[str, ...], real: PageLayout) -> Part:
    """Milliseconds per prompt, from the first pool's HBM to the second's, checksums on."""
    tokens = 256 if quick else 2048
    layouts = {"small": dataclasses.replace(SMALL, num_layers=2)} if quick else {"small": SMALL, "real": real}
    part = Part()
    for name in names:
        rows: list[Row] = []
        for kind, layout in layouts.items():
            try:
                rows += _rows(repeats, ways, name, kind, layout, tokens, (1, 2) if quick else STREAMS)
            except TransferError as error:
                part.remarks.append(f"{name}, {kind} blocks, not measured: {error}")
        if rows:
            part.tables[f"prompt of {tokens} tokens, {name}"] = rows
            what = f"discrete over aggregated, {name}, small blocks, one transfer"
            part.aims.append(Aim(what, rows[0]["discrete_over_agg"], AIM, "times", at_least=True))
    part.remarks += [
        "by_request and by_layer read and write one array per layer, by_request_agg pages of all layers",
        "the paper's are NCCL between GPUs: its 1, 2 and 4 threads, each with a communicator, stand beside our streams",
    ]
    return part


def _rows(
    repeats: int, ways: Ways, name: str, kind: str, layout: PageLayout, tokens: int, streams: tuple[int, ...]
) -> list[Row]:
    count = tokens // layout.block_size
    times: dict[tuple[str, int], float] = {}
    frames: dict[str, int] = {}
    for cut, (aggregated, granularity) in CUTS.items():
        shape = Shape(dataclasses.replace(layout, aggregated=aggregated), count, 0)
        with ways.pair(name, shape) as pair:
            before = pair.near.stats()[1].network_calls
            for number in streams:
                times[cut, number] = _send(pair, count, number, granularity, repeats)
            calls = pair.near.stats()[1].network_calls - before
            frames[cut] = calls // (len(streams) * (repeats + 1))
    return [
        {
            "block": kind,
            "frame_kib": layout.bytes_per_block / (2 * layout.num_layers) / 1024,
            "mib": count * layout.bytes_per_block / 2**20,
            "streams": number,
            **{f"{cut}_ms": 1e3 * times[cut, number] for cut in CUTS},
            "discrete_over_agg": times["by_request", number] / times["by_request_agg", number],
            "frames": frames["by_request"],
            "frames_agg": frames["by_request_agg"],
            "paper_discrete_ms": PAPER_MS["by_request"][number],
            "paper_agg_ms": PAPER_MS["by_request_agg"][number],
        }
        for number in streams
    ]


def _send(pair: Pair, count: int, streams: int, cut: Granularity, repeats: int) -> float:
    """Median seconds until all blocks of the prompt have landed; the first time does not count."""
    source = pair.blocks(count, Medium.HBM)
    target = pair.near.alloc_mem(count, Medium.HBM, "b")
    share = count // streams
    parts = [slice(i * share, (i + 1) * share) for i in range(streams)]

    def send() -> None:
        moving = [pair.near.transfer("b", source[part], target[part], granularity=cut) for part in parts]
        for transfer in moving:
            transfer.result(120)

    times = [seconds(send) for _ in range(repeats + 1)]
    pair.near.free_mem(source)
    pair.near.free_mem(target)
    return median(times[1:])
