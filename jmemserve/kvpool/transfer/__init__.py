"""The transfer of blocks from one pool to another: two tables of state machines that take messages and return work.

No I/O and no clock: ``now`` is in seconds, from one monotonic clock per side. Each state has a deadline, and every way
to an end gives back what that side holds exactly once. Messages that are late, doubled or of unknown transfers are
counted and dropped.
"""

from jmemserve.kvpool.transfer.messages import Accept, Cancel, Data, Done, Land, Message, Offer, Refuse, Send, Ship
from jmemserve.kvpool.transfer.receiver import Receiver
from jmemserve.kvpool.transfer.sender import Sender

__all__ = [
    "Accept",
    "Cancel",
    "Data",
    "Done",
    "Land",
    "Message",
    "Offer",
    "Receiver",
    "Refuse",
    "Send",
    "Sender",
    "Ship",
]
