"""What the machine can do to bytes, in GB/s of bytes that arrive; measured in the same run as what is compared."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pool_parts.rows import Row, median, seconds


def copy_rate(threads: int, repeats: int, nbytes: int = 64 << 20) -> float:
    """numpy.copyto between warm arrays, cut into as many stretches as there are threads."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    stretches = [slice(nbytes * i // threads, nbytes * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), stretches))

        copy()
        return nbytes / median([seconds(copy) for _ in range(repeats)]) / 1e9


def tcp_rate(repeats: int, nbytes: int = 64 << 20) -> float:
    """One connection over the loopback: sendall on one thread, recv_into on another."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:

        def move() -> None:
            sender = threading.Thread(target=near.sendall, args=(source.data,))
            sender.start()
            view = memoryview(target)
            while len(view):
                count = far.recv_into(view)
                assert count, "the connection ended early"
                view = view[count:]
            sender.join()

        move()
        return nbytes / median([seconds(move) for _ in range(repeats)]) / 1e9


def measure(repeats: int, quick: bool) -> Row:
    """All limits, as one row."""
    nbytes = (8 if quick else 64) << 20
    return {
        "copy_gb_s": copy_rate(1, repeats, nbytes),
        "copy_2_threads_gb_s": copy_rate(2, repeats, nbytes),
        "tcp_gb_s": tcp_rate(repeats, nbytes),
    }
