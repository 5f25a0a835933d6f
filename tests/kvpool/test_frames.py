"""Frames over TCP: they arrive as they left, strangers do no harm, and every wait ends."""

import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from jmemserve.errors import TransferError
from jmemserve.kvpool.net import frames as frames_module
from jmemserve.kvpool.net.frames import Address, FrameServer, FrameSocket, connect

SECRET = b"a secret of the tests"
MAGIC = b"JMSF"


def echo(frames: FrameSocket) -> None:
    while True:
        frames.send(frames.recv(10.0))


@pytest.fixture
def server() -> Iterator[FrameServer]:
    server = FrameServer("127.0.0.1", 0, SECRET, echo)
    yield server
    server.close()
    assert not [thread for thread in threading.enumerate() if server.address in thread.name]


def dial(server: FrameServer, secret: bytes = SECRET, max_frame: int = frames_module.MAX_FRAME) -> FrameSocket:
    return connect(*Address.parse(server.address), secret, 5.0, max_frame)


def stranger(server: FrameServer) -> socket.socket:
    return socket.create_connection(Address.parse(server.address), timeout=10)


def pair(max_frame: int = frames_module.MAX_FRAME) -> tuple[FrameSocket, FrameSocket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    return FrameSocket(one, max_frame), FrameSocket(two, max_frame)


def rejections(server: FrameServer, count: int, within_s: float = 2.0) -> None:
    end = time.monotonic() + within_s
    while server.rejected < count and time.monotonic() < end:
        time.sleep(0.01)
    assert server.rejected == count


def test_frames_arrive_as_they_left(server):
    client = dial(server)
    for size in (0, 1, 11, 4096, 1 << 20, 9_000_001):
        data = secrets.token_bytes(size)
        sender = threading.Thread(target=client.send, args=(data[: size // 3], memoryview(data)[size // 3 :]))
        sender.start()
        assert client.recv(10.0) == data
        sender.join()
    client.close()
    client.close()


def test_many_parts_and_receiving_into_buffers():
    one, two = pair()
    parts = [bytes([number % 256]) * (number % 7) for number in range(3000)]
    whole = b"".join(parts)
    one.send(*parts)
    head, rest = bytearray(1000), bytearray(len(whole) - 1000)
    two.recv_into(5.0, memoryview(head), memoryview(rest))
    assert bytes(head + rest) == whole
    large = secrets.token_bytes(5 << 20)
    sender = threading.Thread(target=one.send, args=(large,))
    sender.start()
    buffer = bytearray(len(large))
    two.recv_into(5.0, memoryview(buffer))
    sender.join()
    assert buffer == large
    one.close()
    two.close()


def test_both_directions_and_several_threads(server):
    clients = [dial(server) for _ in range(8)]

    def talk(client: FrameSocket, results: list[bool]) -> None:
        for size in range(0, 50_000, 1777):
            data = secrets.token_bytes(size)
            client.send(data)
            results.append(client.recv(10.0) == data)

    results: list[bool] = []
    threads = [threading.Thread(target=talk, args=(client, results)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 * 29 and all(results)
    for client in clients:
        client.close()


def test_ipv6():
    try:
        server = FrameServer("::1", 0, SECRET, echo)
    except TransferError:
        pytest.skip("this machine has no IPv6")
    client = dial(server)
    client.send(b"six")
    assert client.recv(5.0) == b"six"
    client.close()
    server.close()


def test_addresses():
    assert Address.parse("[::1]:80") == Address("::1", 80) and str(Address("::1", 80)) == "[::1]:80"
    assert Address.parse("host:0") == Address("host", 0) and str(Address("host", 7)) == "host:7"
    for wrong in ("", "host", "host:", "host:x", "host:70000", "host:-1", "host:²"):
        with pytest.raises(TransferError):
            Address.parse(wrong)


# ---- strangers


def test_another_secret_is_refused_by_both(server):
    with pytest.raises(TransferError, match="secret"):
        dial(server, b"another")
    rejections(server, 1)

    def fake(listener: socket.socket) -> None:  # takes any proof and has none of its own
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"JMS1" + bytes(32))
            connection.recv(100)
            connection.sendall(bytes(32))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=fake, args=(listener,))
        thread.start()
        with pytest.raises(TransferError, match="does not know the secret"):
            connect(*listener.getsockname(), SECRET, 5.0)
        thread.join()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", secrets.token_bytes(5000), b"JMS1" + bytes(64)])
def test_strange_bytes_are_rejected_at_once(server, said):
    with stranger(server) as raw:
        raw.sendall(said)
        rejections(server, 1)
    client = dial(server)
    client.send(b"fine")
    assert client.recv(5.0) == b"fine"
    client.close()


def test_a_proof_heard_before_or_sent_back_is_none(server):
    """Replay: what a client said to one challenge. Reflection: the challenge of one connection answered by another."""
    with stranger(server) as first, stranger(server) as second:
        nonce = first.recv(36, socket.MSG_WAITALL)[4:]
        second.recv(36, socket.MSG_WAITALL)
        good = frames_module._proof(SECRET, b"client", nonce, bytes(32))
        second.sendall(b"JMS1" + bytes(32) + good)
        rejections(server, 1)
        first.sendall(b"JMS1" + bytes(32) + frames_module._proof(SECRET, b"server", nonce, bytes(32)))
        rejections(server, 2)


def test_half_open_connections_block_nobody(monkeypatch):
    monkeypatch.setattr(frames_module, "HANDSHAKE_S", 0.5)
    server = FrameServer("127.0.0.1", 0, SECRET, echo, max_connections=1)
    silent = [stranger(server) for _ in range(frames_module._MAX_PENDING + 10)]
    client = dial(server)  # at once, and there is a place for it
    client.send(b"fine")
    assert client.recv(5.0) == b"fine"
    rejections(server, len(silent))
    for raw in silent:
        raw.close()
    client.close()
    server.close()


def test_a_trickle_meets_the_deadline_of_the_handshake(monkeypatch):
    monkeypatch.setattr(frames_module, "HANDSHAKE_S", 0.4)
    server = FrameServer("127.0.0.1", 0, SECRET, echo)
    with stranger(server) as raw:
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 3:
                raw.sendall(b"JMS1"[:1] if time.monotonic() - start < 0.01 else b"M")
                time.sleep(0.02)
        assert time.monotonic() - start < 1.5
    server.close()


def test_more_connections_than_allowed_are_closed():
    server = FrameServer("127.0.0.1", 0, SECRET, echo, max_connections=2)
    clients = [dial(server) for _ in range(2)]
    for client in clients:
        client.send(b"in")
        assert client.recv(5.0) == b"in"
    late = dial(server)
    with pytest.raises(TransferError):
        late.recv(5.0)
    late.close()
    clients[0].close()
    end = time.monotonic() + 5
    while True:  # the place is free again soon
        again = dial(server)
        try:
            again.send(b"in")
            assert again.recv(5.0) == b"in"
            break
        except TransferError:
            assert time.monotonic() < end
        finally:
            again.close()
    clients[1].close()
    server.close()


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(TransferError, match="no connection"):
        connect(*address, SECRET, 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it listens, but never speaks
        start = time.monotonic()
        with pytest.raises(TransferError, match="time ran out"):
            connect(*mute.getsockname(), SECRET, 0.3)
        assert time.monotonic() - start < 1
    with FrameServerContext() as server, pytest.raises(TransferError, match="cannot listen"):
        FrameServer(*Address.parse(server.address), SECRET, echo)


class FrameServerContext:
    def __enter__(self) -> FrameServer:
        self.server = FrameServer("127.0.0.1", 0, SECRET, echo)
        return self.server

    def __exit__(self, *error: object) -> None:
        self.server.close()


# ---- broken frames, and time


def test_oversize_is_refused_at_both_ends():
    one, two = pair(max_frame=1000)
    with pytest.raises(TransferError, match="1001 bytes is larger"):
        one.send(bytes(1001))
    one.send(bytes(1000))  # nothing was sent, so nothing is broken
    assert two.recv(5.0) == bytes(1000)
    one.send_raw(struct.pack("<4sQ", MAGIC, 2**62))
    with pytest.raises(TransferError, match="above the limit"):
        two.recv(5.0)
    with pytest.raises(TransferError):
        one.recv(5.0)
    one.close()
    two.close()


@pytest.mark.parametrize("into", [False, True])
def test_what_is_no_frame_breaks_the_connection(into):
    for raw in (b"HTTP" + bytes(8), struct.pack("<4sQ", b"JMS1", 4)):
        one, two = pair()
        one.send_raw(raw, b"abcd")
        with pytest.raises(TransferError, match="no frame"):
            two.recv_into(5.0, memoryview(bytearray(4))) if into else two.recv(5.0)
        with pytest.raises(TransferError, match="no frame"):  # the first reason stays
            two.recv(5.0)
        one.close()
        two.close()


def test_a_frame_of_another_length_is_noticed_at_once():
    for size in (3, 5):
        one, two = pair()
        one.send(bytes(size))
        start = time.monotonic()
        with pytest.raises(TransferError, match=f"{size} bytes where 4 were expected"):
            two.recv_into(5.0, memoryview(bytearray(4)))
        assert time.monotonic() - start < 1
        one.close()
        two.close()


def test_waits_end():
    one, two = pair()
    start = time.monotonic()
    with pytest.raises(TransferError, match="time ran out"):
        two.recv(0.2)
    one.close()
    two.close()
    one, two = pair()
    with pytest.raises(TransferError, match="time ran out"):
        one.send(bytes(60 << 20), timeout_s=0.2)  # nobody reads
    one.close()
    two.close()
    one, two = pair()
    one.send_raw(struct.pack("<4sQ", MAGIC, 100), b"only some")
    with pytest.raises(TransferError, match="time ran out"):
        two.recv_into(0.2, memoryview(bytearray(100)))
    one.close()
    two.close()
    assert 0.6 <= time.monotonic() - start < 2


def test_the_end_of_the_peer_is_seen_at_once():
    one, two = pair()
    threading.Timer(0.1, one.close).start()
    start = time.monotonic()
    with pytest.raises(TransferError, match="the peer closed|reset"):
        two.recv(10.0)
    assert time.monotonic() - start < 1
    with pytest.raises(TransferError):
        two.send(b"x")
    two.close()


def test_close_ends_the_calls_of_other_threads():
    one, two = pair()
    errors: list[str] = []

    def wait() -> None:
        try:
            one.recv(10.0)
        except TransferError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    one.close()
    thread.join()
    assert time.monotonic() - start < 1 and "ended" in errors[0]
    two.close()


def test_closing_the_server_ends_its_connections():
    server = FrameServer("127.0.0.1", 0, SECRET, echo)
    client = dial(server)
    client.send(b"x")
    client.recv(5.0)
    with stranger(server):
        start = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - start < 1
    with pytest.raises(TransferError):
        client.recv(5.0)
    client.close()
    with pytest.raises(TransferError):
        dial(server)
