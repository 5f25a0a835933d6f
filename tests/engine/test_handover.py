"""What travels beside a request: its place in the order comes along, and what makes no sense is refused."""

import dataclasses
import json

import pytest

from jmemserve.engine.handover import pack_sequence, unpack_sequence
from jmemserve.errors import TransferError
from jmemserve.scheduler.fairness import order
from jmemserve.scheduler.messages import Submit, shifted
from jmemserve.scheduler.sequence import Sequence
from jmemserve.server.net.words import TO_INSTANCE
from jmemserve.types import Request, SamplingParams

REQUEST = Request(
    "r1.1",
    (1, 2, 3),
    SamplingParams(max_tokens=8),
    7,
    salt="pepper",
    arrival=10.0,
    session="s",
    tenant="t",
    priority=-5,
    rank=1234.56789,
)


def packed(**changes: object) -> bytes:
    seq = Sequence(REQUEST, [1, 2, 3, 4])
    return json.dumps(json.loads(pack_sequence(seq, 12.0)) | changes).encode()


def test_a_sequence_keeps_its_place_when_it_is_handed_over() -> None:
    seq = unpack_sequence(packed(), (), "decode0", 12.0)
    assert seq.request == REQUEST and order(seq.request) == order(REQUEST)
    elsewhere = unpack_sequence(packed(), (), "decode0", 112.0)  # on another machine's clock
    assert elsewhere.request == dataclasses.replace(REQUEST, arrival=110.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": 101},
        {"priority": "1"},
        {"priority": 1.0},
        {"priority": True},
        {"tenant": 3},
        {"tenant": "t" * 257},
        {"session": None},
        {"rank": float("nan")},
        {"rank": float("inf")},
        {"rank": "first"},
        {"params": {"temperature": -1}},
    ],
)
def test_a_state_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TransferError, match="without a proper state"):
        unpack_sequence(packed(**changes), (), "decode0", 12.0)


def test_a_request_crosses_processes_whole() -> None:
    message = Submit(REQUEST, "decode0")
    assert TO_INSTANCE.decode(TO_INSTANCE.encode(message)) == message
    assert shifted(message, 100.0).request == dataclasses.replace(REQUEST, arrival=110.0)
