"""Cuts a living process off: all its TCP connections end, from outside, as if the network had gone.

Linux lets one process borrow a socket of another (pidfd_getfd) if it may trace it; shutting the borrowed socket down
ends the connection itself. Unix sockets, pipes and listening sockets stay as they are.
"""

import contextlib
import ctypes
import os
import socket
from pathlib import Path

_PIDFD_GETFD = 438  # the same number on every architecture
_ESTABLISHED = "01"


def cut_off(pid: int) -> int:
    """Shut down every established TCP connection of a process; how many. Raises PermissionError."""
    inodes = _established(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    count = 0
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry).removeprefix("socket:[").rstrip("]") not in inodes:
                    continue
                fd = libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
                if fd < 0:
                    raise PermissionError(ctypes.get_errno(), "the sockets of the process cannot be borrowed")
                with socket.socket(fileno=fd) as borrowed:
                    borrowed.shutdown(socket.SHUT_RDWR)
                count += 1
    finally:
        os.close(pidfd)
    return count


def _established(pid: int) -> set[str]:
    """The inodes of the process's established TCP connections."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _ESTABLISHED:
                    inodes.add(fields[9])
    return inodes
