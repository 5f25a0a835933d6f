"""What the processes of a server wait for: signals, and the first of several things."""

import asyncio
import contextlib
import math
import signal
import threading
from collections.abc import Awaitable, Callable

SAME_SIGNAL_S = 0.3  # a signal that follows another one so soon is no second wish


def catch_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; clear it to hear of the next."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    heard = -math.inf

    def hear() -> None:
        nonlocal heard
        # timeout(1) and make signal both a process and its group, which is one wish said twice.
        if loop.time() - heard >= SAME_SIGNAL_S:
            stop.set()
        heard = loop.time()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear)
    return stop


async def first_of(*waits: Awaitable[object]) -> None:
    """Return when one of ``waits`` is done. Coroutines among them are cancelled then; futures go on."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


async def on_daemon_thread(work: Callable[[], None]) -> None:
    """Run ``work`` on a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def body() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # re-raised where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=body, name="load", daemon=True).start()
    await done
