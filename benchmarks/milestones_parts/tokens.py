"""What each arrangement has to compute and to move, in tokens, and whether it did."""

import dataclasses

from milestones_parts.ways import Arrangement

from jmemserve.types import PoolReport


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What the pools have counted so far, over all instances; tokens moved are those of whole blocks."""

    forward: float = 0.0  # tokens that left instances which prefill
    back: float = 0.0  # tokens that left decode instances
    arrived: float = 0.0  # tokens that came in, anywhere
    looked_up: int = 0  # at instances which prefill
    found: int = 0
    evictions: int = 0
    swapped: int = 0
    faults: int = 0

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def count(pools: list[PoolReport], block: int) -> Counts:
    """The counts in these reports."""
    forward = back = arrived = 0.0
    looked_up = found = 0
    for pool in pools:
        hbm = next(medium for medium in pool.media if medium.medium == "HBM")
        tokens_per_byte = block * hbm.capacity / hbm.bytes
        arrived += pool.bytes_in * tokens_per_byte
        if pool.instance.startswith("decode"):
            back += pool.bytes_out * tokens_per_byte
        else:
            forward += pool.bytes_out * tokens_per_byte
            looked_up += pool.query_tokens
            found += pool.hit_tokens
    return Counts(
        forward,
        back,
        arrived,
        looked_up,
        found,
        sum(pool.evictions for pool in pools),
        sum(pool.swapped_out + pool.swapped_in for pool in pools),
        sum(pool.failed_transfers + pool.corrupt for pool in pools),
    )


def under_way(pools: list[PoolReport]) -> int:
    """Transfers that have not ended."""
    return sum(pool.transfers_out + pool.transfers_in for pool in pools)


@dataclasses.dataclass(slots=True)
class Measured:
    """One turn of one session. ``computed``, ``forward`` and ``back`` are tokens; None: not told apart from others'."""

    arrangement: str
    repeat: int
    session: int
    turn: int  # from 1
    user: int
    answer: int
    prompt: int  # all that was said, with the user's last words
    last_prompt: int  # of the turn before; 0: this is the first
    last_answer: int
    ttft_ms: float
    tpot_ms: float
    jct_ms: float
    second_ms: float
    computed: int
    forward: float | None = None
    back: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Tokens, from and to, both included."""

    computed: tuple[int, int]
    forward: tuple[int, int]
    back: tuple[int, int]


def bounds(arrangement: Arrangement, turn: Measured, block: int) -> Bounds:
    """What one turn may take. Caches hold whole blocks, so each edge between known and new costs up to a block.

    Basic computes and moves the whole prompt; Caching-1 computes what the user said and the last answer; Caching-2 no
    longer moves what decode instances have; Caching-3 sends the answer back, and computes what the user said. All but
    the last token of an answer have keys and values when it ends: that one is computed with the next prompt.
    """
    first = turn.last_prompt == 0
    answered = turn.last_answer - 1
    least = turn.user if first else turn.user + 1
    match arrangement.mesh, arrangement.caching:
        case _, "none":
            computed = (turn.prompt, turn.prompt)
        case _, "prefill" | "delta":
            computed = (least, turn.user) if first else (turn.user + turn.last_answer, least + answered + block - 1)
        case _:
            computed = (least, turn.user if first else least + block - 1)
    if arrangement.mesh == "2xcolocated":
        return Bounds(computed, (0, 0), (0, 0))
    whole, lacking = turn.prompt, turn.prompt if first else least
    forward = (
        (lacking, lacking + 2 * (block - 1)) if arrangement.caching in ("delta", "full") else (whole, _up(whole, block))
    )
    back = (
        (max(0, turn.answer - 1 - block + 1), turn.answer - 1 + block - 1) if arrangement.caching == "full" else (0, 0)
    )
    return Bounds(computed, forward, back)


def _up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def violations(arrangement: Arrangement, turns: list[Measured], total: Counts, block: int) -> list[str]:
    """What does not add up in one repeat, in words."""
    found, sums = [], {"computed": [0.0, 0, 0], "forward": [0.0, 0, 0], "back": [0.0, 0, 0]}
    for turn in turns:
        allowed = bounds(arrangement, turn, block)
        for name, sum_of in sums.items():
            low, high = getattr(allowed, name)
            value = getattr(turn, name)
            sum_of[1], sum_of[2] = sum_of[1] + low, sum_of[2] + high
            if value is not None and not low <= value <= high:
                found.append(
                    f"session {turn.session}, turn {turn.turn} (user {turn.user}, last answer {turn.last_answer}, "
                    f"prompt {turn.prompt}): {name} {value:g} tokens, not {low} to {high}"
                )
    sums["computed"][0], sums["forward"][0], sums["back"][0] = total.looked_up - total.found, total.forward, total.back
    for name, (value, low, high) in sums.items():
        if not low <= value <= high:
            found.append(f"{name} {value:g} tokens in all, say the pools, not {low} to {high}")
    told, asked = sum(turn.computed for turn in turns), sum(turn.prompt for turn in turns)
    if total.looked_up != asked:
        found.append(f"the pools looked up {total.looked_up} tokens, but prompts had {asked}")
    if told != total.looked_up - total.found:
        found.append(f"{told} tokens computed, say the clients' usages; {total.looked_up - total.found}, the pools")
    if total.arrived != total.forward + total.back:
        found.append(f"{total.forward + total.back:g} tokens left, {total.arrived:g} arrived")
    for name in ("evictions", "swapped", "faults"):
        if getattr(total, name):
            found.append(f"{getattr(total, name)} {name}, where none should be")
    return [f"{arrangement.name}, repeat {turns[0].repeat}: {text}" for text in found]
