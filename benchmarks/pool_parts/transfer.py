"""Bytes from pool to pool, and by the bare transport, beside a memory copy and a bare socket."""

import functools
from time import perf_counter

from pool_parts import limits
from pool_parts.rows import Aim, Part, Row, median, seconds
from pool_parts.worlds import Pair, Shape, Ways

from jmemserve.errors import TransferError
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool import Flags, Medium
from jmemserve.kvpool.transports import Piece, spec_of

COUNTS = (1, 4, 16, 64, 256)
MEDIA = ((Medium.HBM, Medium.HBM), (Medium.HBM, Medium.DRAM), (Medium.DRAM, Medium.HBM), (Medium.DRAM, Medium.DRAM))
AIM = 0.5  # of a memory copy
NEAR_WAYS = ("local", "staged-shm")  # those that are to keep up with a memory copy


def measure(repeats: int, quick: bool, ways: Ways, names: tuple[str, ...], layout: PageLayout) -> Part:
    """GB/s of payload, by blocks and media; "verb" is ``MemPool.transfer``, "bare" a publish and a fetch alone."""
    counts = COUNTS[:2] if quick else COUNTS
    part = Part(tables={"limits": [limits.measure(repeats, quick)]})
    for name in names:
        rows: list[Row] = []
        try:
            with ways.pair(name, Shape(layout, max(counts), max(counts))) as pair:
                for source, target in MEDIA[:2] if quick else MEDIA:
                    rows += [_row(pair, count, source, target, repeats) for count in counts]
        except TransferError as error:
            part.remarks.append(f"{name} stopped: {error}")
        if rows:
            part.tables[f"{name}, {pair.processes} process{'es' * (pair.processes > 1)}"] = rows
            if name in NEAR_WAYS and rows[-1]["blocks"] == max(counts):
                part.aims += _aims(name, rows, part.tables["limits"][0]["copy_gb_s"])
    part.tables["limits"].append(limits.measure(repeats, quick))  # again, to show how steady the machine was
    part.remarks.append(
        f"a block is {layout.bytes_per_block / 1024:.0f} KiB; limits before and after; local "
        "bare HBM to HBM on CPU without checksums gives memory a second name: no byte moves"
    )
    return part


def _aims(name: str, rows: list[Row], copy: float) -> list[Aim]:
    """Of the largest size, from HBM to HBM."""
    largest = [row for row in rows if row["from"] == row["to"] == "HBM"][-1]
    return [
        Aim(f"{name}, {what}, of a memory copy", largest[column] / copy, AIM, "times", at_least=True)
        for what, column in (
            ("transfer verb", "verb_gb_s"),
            ("bare transport", "bare_gb_s"),
            ("bare, no checksums", "bare_unchecked_gb_s"),
        )
    ]


def _row(pair: Pair, count: int, source: Medium, target: Medium, repeats: int) -> Row:
    nbytes = count * pair.near.node.store.layout.bytes_per_block
    blocks = pair.blocks(count, source)
    places = pair.near.alloc_mem(count, target, "b")
    row: Row = {"from": source.name, "to": target.name, "blocks": count, "mib": nbytes / 2**20}

    def send(flags: Flags) -> None:
        pair.near.transfer("b", blocks, places, flags).result(120)

    for column, flags in (("verb_gb_s", Flags.NONE), ("verb_unchecked_gb_s", Flags.NO_CHECKSUM)):
        times = [seconds(functools.partial(send, flags)) for _ in range(repeats + 1)]
        row[column] = nbytes / median(times[1:]) / 1e9
        row[column.replace("gb_s", "ms")] = 1e3 * median(times[1:])
    row["verb_checksum_cost"] = row["verb_unchecked_gb_s"] / row["verb_gb_s"] - 1
    pair.near.free_mem(places)
    for column, checksum in (("bare_gb_s", True), ("bare_unchecked_gb_s", False)):
        times = [_bare(pair, [a.index for a in blocks], source, target, checksum) for _ in range(repeats + 1)]
        row[column] = nbytes / median(times[1:]) / 1e9
    row["bare_checksum_cost"] = row["bare_unchecked_gb_s"] / row["bare_gb_s"] - 1
    pair.near.free_mem(blocks)
    return row


def _bare(pair: Pair, numbers: list[int], source: Medium, target: Medium, checksum: bool) -> float:
    """Seconds of publish and fetch, one piece after another of the sizes that transfers use; reads do not count."""
    node, total = pair.near.node, 0.0
    for start, stop in node.store.cuts(len(numbers)):
        piece: Piece
        if source is Medium.HBM:
            piece = node.store.gather(numbers[start:stop])  # nobody else uses the pages meanwhile
            piece.block_until_ready()
        else:
            assert node.arena is not None, "a pool without DRAM"
            piece = node.arena.slots_of(numbers[start:stop])
        began = perf_counter()
        ticket = pair.transport.publish(f"bare{start}", piece, stop - start, checksum)
        total += perf_counter() - began
        spec = spec_of(piece, stop - start)
        order = [ticket, pair.transport.endpoint(), list(spec.shape), spec.dtype, spec.frames, int(target)]
        total += pair.far.ask({"fetch": order})
        pair.transport.release(f"bare{start}")
    return total
