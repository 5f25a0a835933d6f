"""The state of a sequence that moves to another instance: what travels, unread, beside its blocks."""

import dataclasses
import json

from jmemserve.errors import TransferError
from jmemserve.scheduler.sequence import Sequence, Stamps
from jmemserve.types import Request, SamplingParams


def pack_sequence(seq: Sequence) -> bytes:
    """All of a sequence but the tokens whose keys and values travel, which the transfer itself carries."""
    request = seq.request
    state = {
        "id": request.id,
        "prompt": len(request.prompt),
        "params": dataclasses.asdict(request.params),
        "seed": request.seed,
        "stop_ids": sorted(request.stop_ids),
        "salt": request.salt,
        "arrival": request.arrival,
        "deadline": request.deadline,
        "follows": request.follows,
        "rest": seq.tokens[seq.landed :],  # known, not yet computed
        "cached_tokens": seq.cached_tokens,
        "stamps": dataclasses.asdict(seq.stamps),
    }
    return json.dumps(state).encode()


def unpack_sequence(private: bytes, computed: tuple[int, ...], decode_hint: str) -> Sequence:
    """The sequence; ``computed``: the tokens whose keys and values came. Raises TransferError if it makes no sense."""
    try:
        state = json.loads(private)
        tokens = [*computed, *state["rest"]]
        request = Request(
            state["id"],
            tuple(tokens[: state["prompt"]]),
            SamplingParams(**state["params"]),
            state["seed"],
            stop_ids=frozenset(state["stop_ids"]),
            salt=state["salt"],
            arrival=state["arrival"],
            deadline=state["deadline"],
            follows=state["follows"],
        )
        request.params.check()
        seq = Sequence(request, tokens, decode_hint, stamps=Stamps(**state["stamps"]))
        seq.cached_tokens = int(state["cached_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise TransferError(f"a sequence came without a proper state: {error!r}") from error
    return seq
