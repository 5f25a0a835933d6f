"""The way from a front-end to an instance, in whatever process; another front-end gets the roster by one too."""

from typing import Protocol

from jmemserve.scheduler import messages as m


class Port(Protocol):
    """The way to one instance."""

    def send(self, message: m.ToInstance) -> None:
        """Never blocks; what cannot be sent is lost, and ``Cluster.down`` follows."""
        ...

    def beat(self) -> m.Beat | None:
        """A sign of life, from an instance that gives none of its own accord."""
        ...

    def close(self, reason: str) -> None:
        """The instance is no member any more, or this front-end ends. Must not block."""
        ...
