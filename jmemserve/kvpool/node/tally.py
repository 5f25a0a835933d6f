"""What a node has moved and met, counted in one place by all its parts."""

import dataclasses


@dataclasses.dataclass(slots=True)
class Tally:
    """Counts since the start, or since ``reset``."""

    transfer_calls: int = 0  # transfers times parts
    network_calls: int = 0  # contiguous runs of bytes handed to a transport
    bytes_out: int = 0
    bytes_in: int = 0
    dropped: int = 0  # messages that the node itself dropped
    corrupt: int = 0  # pieces whose checksums differed
    failed: int = 0  # transfers from here that ended without success
    expired_leases: int = 0  # blocks freed because nobody renewed their lease

    def reset(self) -> None:
        """Count anew: what was moved to try the links is not the users'."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, 0)
