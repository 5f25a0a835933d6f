"""Counting compilations: none may happen once an instance is warm."""

import threading

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Programs that XLA compiled (or loaded from the persistent cache) in this process since it was made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration: float, **_: str | int) -> None:
        if event == _EVENT:
            with self._lock:
                self._count += 1

    @property
    def count(self) -> int:
        return self._count

    def close(self) -> None:
        """Stop counting."""
        monitoring.unregister_event_duration_listener(self._on_event)
