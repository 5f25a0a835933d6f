"""Links of messages: order, names, refusals, replacement, and the end of a peer, told once."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jmemserve.errors import TransferError, Unavailable
from jmemserve.kvpool.net import frames, link
from jmemserve.kvpool.net.link import SocketLink

SECRET = b"a secret of the tests"


class End:
    """A link whose callbacks are recorded in order: ("hello", name), ("down", name), (name, message)."""

    def __init__(self, name: str, secret: bytes = SECRET, silence_s: float = 10.0, slow_s: float = 0.0):
        self.name = name
        self.slow_s = slow_s
        self.refuse = ""
        self.seen: list[tuple[str, object]] = []
        self.link = SocketLink(
            name.encode(),
            secret,
            accept=self.accept,
            on_message=self.on_message,
            on_down=lambda peer: self.seen.append(("down", peer)),
            silence_s=silence_s,
        )

    def accept(self, hello: bytes) -> str:
        if self.refuse:
            raise Unavailable(self.refuse)
        self.seen.append(("hello", hello.decode()))
        return hello.decode()

    def on_message(self, peer: str, payload: bytes) -> None:
        time.sleep(self.slow_s)
        self.seen.append((peer, payload))

    def messages(self, peer: str) -> list[object]:
        return [what for who, what in self.seen if who == peer]

    def downs(self) -> int:
        return len(self.messages("down"))


def wait(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def ends() -> Iterator[Callable[..., End]]:
    made: list[End] = []

    def make(*arguments, **options) -> End:
        made.append(End(*arguments, **options))
        return made[-1]

    yield make
    for end in made:
        end.link.close()
        end.link.close()
    wait(lambda: not [t for t in threading.enumerate() if t.name.startswith(("link-", "serve-", "accept-"))])


def test_messages_arrive_once_in_order_both_ways(ends):
    a, b = ends("a"), ends("b")
    assert a.link.connect(b.link.address) == "b"
    assert a.link.peers() == ["b"] and b.link.peers() == ["a"]  # at once, on both sides
    sent = [b"%d" % number * (1 + number % 500) for number in range(1, 2000)]
    for payload in sent:
        a.link.send("b", payload)
        b.link.send("a", payload)
    wait(lambda: len(b.messages("a")) == len(a.messages("b")) == len(sent))
    assert b.messages("a") == a.messages("b") == sent
    a.link.close()
    wait(lambda: b.downs() == 1)
    assert b.seen[-1] == ("down", "a") and a.downs() == 0
    with pytest.raises(TransferError, match="no link to 'a'"):
        b.link.send("a", b"x")


def test_sending_where_it_cannot_go(ends):
    a = ends("a")
    for payload, match in ((b"x", "no link"), (b"", "from 1"), (bytes(frames.MAX_FRAME + 1), "from 1")):
        with pytest.raises(TransferError, match=match):
            a.link.send("nobody", payload)


def test_a_refusal_tells_its_reason(ends):
    a, b = ends("a"), ends("b")
    b.refuse = "the blocks differ: " + "x" * 5000
    with pytest.raises(TransferError, match="refused: the blocks differ: x{900}"):
        a.link.connect(b.link.address)
    a.refuse, b.refuse = "not with you", ""
    with pytest.raises(TransferError, match="not with you"):
        a.link.connect(b.link.address)
    assert a.link.peers() == b.link.peers() == [] and a.downs() == b.downs() == 0
    a.refuse = ""
    assert a.link.connect(b.link.address) == "b"


def test_strangers_are_no_peers(ends):
    a, b = ends("a"), ends("b", secret=b"another")
    with pytest.raises(TransferError, match="secret"):
        b.link.connect(a.link.address)
    connection = frames.connect(*frames.Address.parse(a.link.address), SECRET, 5.0)
    connection.send(b"short")  # knows the secret, but says no hello
    with pytest.raises(TransferError):
        connection.recv(5.0)
    connection.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(TransferError, match="no connection"):
        a.link.connect(address, timeout_s=1.0)
    with pytest.raises(TransferError, match="HOST:PORT"):
        a.link.connect("nowhere")
    assert a.seen == []


def test_a_new_connection_takes_the_place_of_the_old(ends):
    """A restarted peer: the end of its former life is told after that life's messages and before any of the new."""
    a, old = ends("a", slow_s=0.01), ends("b")
    old.link.connect(a.link.address)
    for _ in range(20):
        old.link.send("a", b"old")
    wait(lambda: len(a.messages("b")) > 0)
    new = ends("b")
    new.link.connect(a.link.address)
    new.link.send("a", b"new")
    wait(lambda: ("b", b"new") in a.seen)
    told = [what for what in a.seen if what[0] != "hello"]
    place = told.index(("down", "b"))
    assert set(told[:place]) == {("b", b"old")} and told[place + 1 :] == [("b", b"new")]
    wait(lambda: old.downs() == 1)
    a.link.send("b", b"to the new")
    wait(lambda: new.messages("a") == [b"to the new"])
    assert old.messages("a") == [] and new.downs() == 0 and a.downs() == 1


def test_both_connect_at_the_same_time(ends):
    """Whatever crosses, one connection is left, and it works."""
    for round_ in range(10):
        a, b = ends(f"a{round_}"), ends(f"b{round_}")
        barrier = threading.Barrier(2)

        def go(one: End, two: End, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            one.link.connect(two.link.address)

        threads = [threading.Thread(target=go, args=pair) for pair in ((a, b), (b, a))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.05)
        assert a.link.peers() == [b.name] and b.link.peers() == [a.name]
        a.link.send(b.name, b"x")
        b.link.send(a.name, b"y")
        wait(lambda a=a, b=b: a.messages(b.name) == [b"y"] and b.messages(a.name) == [b"x"])


def test_links_to_many(ends):
    hub = ends("hub")
    others = [ends(f"o{number}") for number in range(6)]
    for other in others:
        other.link.connect(hub.link.address)
    for other in others:
        hub.link.send(other.name, other.name.encode())
        other.link.send("hub", other.name.encode())
    wait(lambda: all(other.messages("hub") == [other.name.encode()] for other in others))
    wait(lambda: all(hub.messages(other.name) == [other.name.encode()] for other in others))
    others[2].link.close()
    wait(lambda: hub.messages("down") == ["o2"])
    hub.link.send("o3", b"still")
    wait(lambda: others[3].messages("hub")[-1] == b"still")


def test_silence_is_broken_by_keepalives(ends):
    a, b = ends("a", silence_s=0.4), ends("b", silence_s=0.4)
    a.link.connect(b.link.address)
    time.sleep(1.5)
    a.link.send("b", b"still here")
    wait(lambda: b.messages("a") == [b"still here"])
    assert a.downs() == b.downs() == 0


def test_a_full_queue_ends_the_link_and_blocks_nobody(ends, monkeypatch):
    monkeypatch.setattr(link, "MAX_QUEUE", 50)
    a, b = ends("a"), ends("b", slow_s=0.2)
    a.link.connect(b.link.address)
    start = time.monotonic()
    with pytest.raises(TransferError, match="does not take its messages"):
        for _ in range(1000):
            a.link.send("b", bytes(1 << 20))
    assert time.monotonic() - start < 5
    wait(lambda: a.downs() == 1)
    with pytest.raises(TransferError):
        a.link.send("b", b"x")
    monkeypatch.setattr(link, "MAX_QUEUE", 5000)
    monkeypatch.setattr(link, "MAX_QUEUE_BYTES", 3000)
    a.link.connect(b.link.address)
    with pytest.raises(TransferError, match="does not take"):
        a.link.send("b", bytes(3001))
    wait(lambda: a.downs() == 2)


def test_close_from_a_callback(ends):
    a, b = ends("a"), ends("b")
    a.link.connect(b.link.address)
    done = threading.Event()

    def close(peer: str, payload: bytes) -> None:
        b.link.close()
        done.set()

    b.link._on_message = close
    a.link.send("b", b"end")
    assert done.wait(5)
    wait(lambda: a.downs() == 1)
    with pytest.raises(TransferError):
        b.link.connect(a.link.address)


def test_an_oversize_message_from_a_peer_ends_only_its_link(ends):
    a, b = ends("a"), ends("b")
    a.link.connect(b.link.address)
    connection = frames.connect(*frames.Address.parse(b.link.address), SECRET, 5.0)
    connection.send(bytes(16), b"c")
    connection.recv(5.0)
    connection.send(b"y")
    assert connection.recv(5.0) == b"r"
    connection.send_raw(struct.pack("<4sQ", b"JMSF", 1 << 60))
    wait(lambda: b.messages("down") == ["c"])
    connection.close()
    a.link.send("b", b"fine")
    wait(lambda: b.messages("a") == [b"fine"])


# ---- two processes

PEER = """
import sys, threading
from jmemserve.kvpool.net.link import SocketLink
end = threading.Event()
link = SocketLink(b"far", b"a secret of the tests", accept=bytes.decode, silence_s=1.0,
                  on_message=lambda peer, payload: link.send(peer, payload), on_down=lambda peer: end.set())
print(link.address, flush=True)
end.wait(60)
"""


@pytest.fixture
def far() -> Iterator[tuple[subprocess.Popen, str]]:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PEER], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_peer_is_noticed_at_once(ends, far):
    process, address = far
    a = ends("a")
    assert a.link.connect(address) == "far"
    a.link.send("far", b"echo")
    wait(lambda: a.messages("far") == [b"echo"])
    process.kill()
    wait(lambda: a.downs() == 1, within_s=1.0)


def test_a_silent_peer_is_noticed_in_time(ends, far):
    process, address = far
    a = ends("a", silence_s=0.6)
    a.link.connect(address)
    process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    wait(lambda: a.downs() == 1, within_s=2.0)
    assert time.monotonic() - start > 0.3
    process.send_signal(signal.SIGCONT)
