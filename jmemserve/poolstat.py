"""``python -m jmemserve.poolstat HOST:PORT``: what every instance's memory pool holds and has moved."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from jmemserve.client import DEFAULT_ADDRESS, Client
from jmemserve.errors import JmemserveError
from jmemserve.types import MediumReport, PoolReport

WIDTH = 80  # characters of a line
BAR = 20  # characters
MAX_WATCH_S = 86_400


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, also after Ctrl-C; 1 after an error, with a sentence."""
    parser = argparse.ArgumentParser("python -m jmemserve.poolstat", description=__doc__, allow_abbrev=False)
    parser.add_argument("address", nargs="?", default=DEFAULT_ADDRESS, help="HOST:PORT (default: %(default)s)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again every so many seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.watch is not None and not 0 < arguments.watch <= MAX_WATCH_S:
        parser.error(f"--watch must be above 0 and at most {MAX_WATCH_S} seconds, not {arguments.watch:g}")
    try:
        with Client(arguments.address) as client:
            while True:
                pools = client.pools()
                if not pools:
                    print("error: the server is still loading; try again in a few seconds", file=sys.stderr)
                    return 1
                show = _as_json if arguments.json else table
                print("\n".join(show(pool) for pool in pools), flush=True)
                if arguments.watch is None:
                    return 0
                time.sleep(arguments.watch)
    except (KeyboardInterrupt, BrokenPipeError):
        return 0
    except JmemserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _as_json(pool: PoolReport) -> str:
    return json.dumps(dataclasses.asdict(pool))


def table(pool: PoolReport) -> str:
    """One pool in lines of at most 80 characters: bars of held (#), cached (+) and free (.) blocks, then counts."""
    lines = [pool.instance]
    lines += [_medium(medium) for medium in pool.media]
    if pool.query_tokens:
        share = 100 * pool.hit_tokens / pool.query_tokens
        looked_up = f"{share:.1f} % of {pool.query_tokens:,} tokens, {pool.dram_hit_tokens:,} from DRAM"
    else:
        looked_up = "nothing was looked up yet"
    lines.append(f"  hits       {looked_up}")
    lines.append(
        f"  cached     {pool.prefix_blocks:,} blocks of prefixes in {pool.runs:,} runs, {pool.evictions:,} dropped"
    )
    lines.append(f"  swapped    {pool.swapped_out:,} out, {pool.swapped_in:,} in, {pool.swaps} orders under way")
    lines.append(f"  transfers  {pool.transfers_out} out and {pool.transfers_in} in under way")
    lines.append(f"             {_size(pool.bytes_out)} out, {_size(pool.bytes_in)} in")
    lines.append(f"  calls      of transfers {pool.transfer_calls:,}, of the network {pool.network_calls:,}")
    lines.append(
        f"  faults     {pool.failed_transfers:,} failed, {pool.corrupt:,} corrupt, {pool.dropped:,} messages dropped"
    )
    lines.append(f"             {pool.expired_leases:,} blocks of expired leases")
    for name, way in pool.peers:
        lines.append(f"  peer       {name:.40} by {way}")
    for name, blocks, left in pool.leases:
        lines.append(f"  lease      {name:.40}: {blocks:,} blocks, {left:.0f} s left")
    if pool.oldest:
        ages = ", ".join(f"{age:.0f} s ({blocks})" for age, blocks in pool.oldest[:5])
        lines.append(f"  oldest     {ages:.66}")
    lines.append(f"  events     the next is number {pool.last_event + 1:,}")
    return "\n".join(line[:WIDTH] for line in lines)


def _medium(medium: MediumReport) -> str:
    total = max(medium.capacity, 1)
    held = -(-BAR * medium.held // total)
    cached = min(BAR - held, -(-BAR * medium.cached // total))
    bar = "#" * held + "+" * cached + "." * (BAR - held - cached)
    used = 100 * (medium.held + medium.cached) / total
    counts = f"{medium.held:,} held {medium.cached:,} cached {medium.free:,} free"
    return f"  {medium.medium:5}{_size(medium.bytes):>8} [{bar}] {used:3.0f}% {counts}"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
