"""What comes to a thread: messages, and functions to be called there."""

import queue
from collections.abc import Callable
from concurrent.futures import Future

from jmemserve.errors import Unavailable

CALL_S = 30.0  # what is called on the thread from another one is given up after so long


class Mailbox:
    """Any thread posts, one takes. A callable message is to be called by whoever takes it."""

    def __init__(self, owner: str):
        self._owner = owner
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()

    def post(self, message: object) -> None:
        """Hand something over; never blocks."""
        self._queue.put(message)

    def call[T](self, function: Callable[[], T]) -> T:
        """Call on the owner's thread and wait. Raises Unavailable if it does not come to it, or what it raises."""
        answer: Future[T] = Future()

        def work() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # it belongs to the caller
                answer.set_exception(error)

        self.post(work)
        try:
            return answer.result(CALL_S)
        except TimeoutError:
            raise Unavailable(f"{self._owner} does not answer") from None

    def take(self, wait_s: float) -> object | None:
        """The next message; None if none comes in that time."""
        try:
            return self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
        except queue.Empty:
            return None
