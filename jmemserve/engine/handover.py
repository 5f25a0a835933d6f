"""The state of a sequence that moves to another instance: what travels, unread, beside its blocks."""

import dataclasses
import json
import math

from jmemserve.errors import InvalidRequest, TransferError
from jmemserve.scheduler.sequence import Sequence, Stamps
from jmemserve.types import Request, SamplingParams, check_standing


def pack_sequence(seq: Sequence, now: float, origin: str | None = None) -> bytes:
    """All of a sequence but the tokens whose keys and values travel, which the transfer itself carries.

    Times travel as seconds before or after ``now``: the clocks of two machines have nothing in common. ``origin``: the
    instance that wants back what is made from here on.
    """
    request = seq.request
    state = {
        "id": request.id,
        "prompt": len(request.prompt),
        "params": dataclasses.asdict(request.params),
        "seed": request.seed,
        "stop_ids": sorted(request.stop_ids),
        "salt": request.salt,
        "arrival": request.arrival - now,
        "deadline": None if request.deadline is None else request.deadline - now,
        "follows": request.follows,
        "session": request.session,
        "tenant": request.tenant,
        "priority": request.priority,
        "rank": request.rank,
        "rest": seq.tokens[seq.landed :],  # known, not yet computed
        "cached_tokens": seq.cached_tokens,
        "stamps": {name: stamp - now for name, stamp in dataclasses.asdict(seq.stamps).items() if stamp},
        "origin": origin,
    }
    return json.dumps(state).encode()


def unpack_sequence(private: bytes, computed: tuple[int, ...], decode_hint: str, now: float) -> Sequence:
    """The sequence; ``computed``: the tokens whose keys and values came. Raises TransferError if it makes no sense."""
    try:
        state = json.loads(private)
        tokens = [*computed, *state["rest"]]
        deadline = state["deadline"]
        request = Request(
            state["id"],
            tuple(tokens[: state["prompt"]]),
            SamplingParams(**state["params"]),
            state["seed"],
            stop_ids=frozenset(state["stop_ids"]),
            salt=state["salt"],
            arrival=state["arrival"] + now,
            deadline=None if deadline is None else deadline + now,
            follows=state["follows"],
            session=state["session"],
            tenant=state["tenant"],
            priority=state["priority"],
            rank=float(state["rank"]),
        )
        request.params.check()
        check_standing(request.session, request.tenant, request.priority, request.salt)
        if not math.isfinite(request.rank):
            raise ValueError(f"rank {request.rank}")
        stamps = Stamps(**{name: stamp + now for name, stamp in state["stamps"].items()})
        seq = Sequence(request, tokens, decode_hint, stamps=stamps)
        seq.cached_tokens, seq.origin = int(state["cached_tokens"]), state["origin"]
        if not isinstance(seq.origin, str | None):
            raise TypeError(f"origin {seq.origin!r}")
    except (InvalidRequest, ValueError, KeyError, TypeError) as error:
        raise TransferError(f"a sequence came without a proper state: {error!r}") from error
    return seq
