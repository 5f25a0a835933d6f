"""Compilations: counted, since none may happen once an instance is warm, and kept between starts."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from jmemserve.errors import ConfigError

_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


def keep_compilations(folder: str) -> None:
    """Keep every compiled program in ``folder`` and look there first. Raises ConfigError if it cannot be written."""
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--compilation-cache-dir {folder!r} cannot be written ({error}); choose another or 'off'"
        ) from None
    if jax.config.jax_compilation_cache_dir != str(path):
        compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompileCounter:
    """Programs that this process compiled or loaded from the persistent cache since the counter was made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0  # compiled or found
        self.found = 0  # of these, found in the persistent cache
        self.seconds = 0.0  # of all threads together, of those that were compiled or found
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            with self._lock:
                self.count += 1
                self.seconds += duration_secs

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == _FOUND:
            with self._lock:
                self.found += 1

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """What is compiled meanwhile was asked for: another role needs other shapes."""
        before = self.count
        yield
        with self._lock:
            self.count = before

    def close(self) -> None:
        """Stop counting."""
        monitoring.unregister_event_duration_listener(self._on_duration)
        monitoring.unregister_event_listener(self._on_event)
