"""Every exception jmemserve raises on purpose.

    JmemserveError
    ├── ClientError                 the client's mistake: a 4xx, with a sentence that says what to change
    │   ├── InvalidRequest          INVALID_ARGUMENT     a value that can never work
    │   ├── DuplicateRequest        ALREADY_EXISTS       the id is in flight already
    │   ├── UnknownRequest          NOT_FOUND            no such thing
    │   └── ConfigError             (start-up)           a flag, mesh, model folder or file that cannot be used
    │       └── CheckpointError     (start-up)           the checkpoint is broken or disagrees with its config
    ├── WorldError                  the world's failure: retried, or it fails that one request
    │   ├── Overloaded              RESOURCE_EXHAUSTED   a bounded queue is full; carries a retry hint
    │   ├── Unavailable             UNAVAILABLE          loading, draining, or no instance is left
    │   │   └── NameTaken           (start-up)           another process is a member under this name, for now
    │   ├── DeadlineExceeded        DEADLINE_EXCEEDED    the client's deadline passed
    │   └── TransferError           (internal)           blocks did not arrive; the sequence is caught up elsewhere
    │       └── CorruptBlock        (internal)           bytes arrived other than they left
    └── PoolError                   a wrong call of the memory pool; nothing was changed
        ├── PoolFull                not enough room: needed, free and cached are in the message
        ├── RemoteRefused           another instance has not enough room; its words are in the message
        ├── StaleAddress            the block was freed since (its generation rose), or was freed twice
        ├── ForeignAddress          the address belongs to another instance or medium
        ├── InvalidAddresses        too few addresses, or blocks that stand for other tokens already
        ├── InvalidTokens           token ids that no index can hold
        ├── InvalidTransfer         arguments of a transfer that can never work, such as too large a private part
        └── UnknownInstance         there is no link to an instance of this name

Our own bugs are ``assert`` with both values in the message, never one of these.
"""


class JmemserveError(Exception):
    """Base of all exceptions of this package."""


class ClientError(JmemserveError):
    """The caller asked for something that cannot be done; the message says what to change."""


class InvalidRequest(ClientError):
    """A value that can never work."""


class DuplicateRequest(ClientError):
    """A request with this id is in flight already."""


class UnknownRequest(ClientError):
    """There is no such request, instance or model."""


class ConfigError(ClientError):
    """A flag, mesh, model folder or file that cannot be used."""


class CheckpointError(ConfigError):
    """The checkpoint is broken, or its files disagree with each other."""


class WorldError(JmemserveError):
    """Something outside failed; another try may succeed."""


class Overloaded(WorldError):
    """A bounded queue is full. ``retry_after_s`` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(WorldError):
    """Loading, draining, or no instance can serve."""


class NameTaken(Unavailable):
    """Another process is a member of the cluster under this name; it may be dead without anybody knowing yet."""


class DeadlineExceeded(WorldError):
    """The deadline of the request passed."""


class TransferError(WorldError):
    """Blocks did not arrive where they were sent."""


class CorruptBlock(TransferError):
    """Bytes arrived other than they left."""


class PoolError(JmemserveError):
    """A wrong call of the memory pool; the pool is unchanged."""


class PoolFull(PoolError):
    """There is no room for an allocation."""

    def __init__(self, needed: int, free: int, cached: int):
        super().__init__(f"{needed} blocks needed, but only {free} are free and {cached} cached ones could be dropped")
        self.needed, self.free, self.cached = needed, free, cached


class RemoteRefused(PoolError):
    """Another instance refused an allocation; its reason is in the message."""


class StaleAddress(PoolError):
    """The block behind the address was freed; the address must not be used again."""


class ForeignAddress(PoolError):
    """The address does not belong to this pool."""


class InvalidAddresses(PoolError):
    """The addresses cannot be what the call needs: too few, given twice, or used under other tokens."""


class InvalidTokens(PoolError):
    """Token ids that are no whole numbers of int32."""


class InvalidTransfer(PoolError):
    """The arguments of a transfer can never work."""


class UnknownInstance(PoolError):
    """There is no link to an instance of this name."""
