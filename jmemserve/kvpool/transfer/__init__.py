"""The transfer of blocks from one pool to another: two tables of state machines that take messages and return work.

No I/O and no clock: ``now`` is in seconds, from one monotonic clock per side. Each state has a deadline, and every way
to an end gives back what that side holds exactly once. Messages that are late, doubled or of unknown transfers are
counted and dropped.
"""

from jmemserve.kvpool.transfer.messages import (
    MAX_PRIVATE,
    RENEWED,
    WHOLE,
    Accept,
    Allocate,
    Allocated,
    Arrived,
    Cancel,
    Close,
    Data,
    Done,
    Flags,
    Free,
    Granularity,
    Hello,
    Land,
    Landed,
    Message,
    Offer,
    Refuse,
    Renew,
    Send,
    Ship,
)
from jmemserve.kvpool.transfer.receiver import Receiver
from jmemserve.kvpool.transfer.sender import Sender

__all__ = [
    "MAX_PRIVATE",
    "RENEWED",
    "WHOLE",
    "Accept",
    "Allocate",
    "Allocated",
    "Arrived",
    "Cancel",
    "Close",
    "Data",
    "Done",
    "Flags",
    "Free",
    "Granularity",
    "Hello",
    "Land",
    "Landed",
    "Message",
    "Offer",
    "Receiver",
    "Refuse",
    "Renew",
    "Send",
    "Sender",
    "Ship",
]
