"""Start a server, send prompts that share a prefix, print what is streamed back and how fast, stop the server.

    python tools/demo.py [flags of jmemserve.serve]

Without flags the demo model is served with a prefill and a decode instance. The first prompt has to be computed whole;
the others begin with the same scene, whose blocks are found in the cache.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from jmemserve.client import Client, Delta
from jmemserve.errors import JmemserveError, Unavailable
from jmemserve.types import SamplingParams, Timings, Usage

START_S = 600.0  # at most; the first start compiles
STOP_S = 45.0  # the server itself allows 30 s for what runs
WIDTH = 78
SCENE = """\
First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.

First Citizen:
First, you know Caius Marcius is chief enemy to the people.

All:
We know't, we know't.

First Citizen:
Let us kill him, and we'll have corn at our own price.
Is't a verdict?

All:
No more talking on't; let it be done: away, away!

"""
SPEAKERS = ("MENENIUS", "CORIOLANUS", "Second Citizen", "VOLUMNIA")
PARAMS = SamplingParams(temperature=0.6, top_p=0.9, seed=1, max_tokens=64)


@contextlib.contextmanager
def running_server(flags: Sequence[str]) -> Iterator[str]:
    """A server that is ready; yields its address. It is drained at the end, whatever happens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # A session of its own: Ctrl-C reaches this script, which then stops the server in order.
    command = [sys.executable, "-m", "jmemserve.serve", *flags, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until_ready(server, address)
        yield address
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    """Return when health says SERVING. Raises Unavailable if the server ends, or takes too long."""
    limit = time.monotonic() + START_S
    with Client(address) as client:
        while time.monotonic() < limit:
            if (code := server.poll()) is not None:
                raise Unavailable(f"the server ended with exit status {code} before it was ready")
            with contextlib.suppress(Unavailable):  # not listening yet
                if client.is_serving():
                    return
            time.sleep(0.1)
    raise Unavailable(f"the server was not ready within {START_S:g} s")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Drain the server and wait for its end; kill it if it does not end in time."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        server.kill()
        server.wait()


def show(client: Client, speaker: str) -> str:
    """Stream one prompt to the screen; a line of what it cost."""
    print(f"{'─' * 4} {speaker} {'─' * (WIDTH - 6 - len(speaker))}")
    usage, timings = Usage(), Timings()
    for message in client.stream(f"{SCENE}{speaker}:\n", PARAMS):
        if isinstance(message, Delta):
            print(message.text, end="", flush=True)
        elif message.error is not None:
            raise message.error
        else:
            usage, timings = message.usage, message.timings
    print("\n")
    tpot = timings.decode_s / max(1, usage.completion_tokens - 1)
    return (
        f"{speaker:<16} {usage.prompt_tokens:>7} {usage.cached_tokens:>7} {usage.completion_tokens:>7} "
        f"{timings.first_token_s * 1e3:>9.1f} {tpot * 1e3:>9.2f} {timings.transfer_s * 1e3:>11.1f}"
    )


def main(flags: Sequence[str]) -> int:
    """Returns the exit status: 0, 1 if the server or a request failed, 130 after Ctrl-C."""
    try:
        with running_server(flags) as address, Client(address) as client:
            print()
            lines = [show(client, speaker) for speaker in SPEAKERS]
            print(f"{'':<16} {'prompt':>7} {'cached':>7} {'new':>7} {'TTFT':>9} {'TPOT':>9} {'moving':>11}")
            print(f"{'':<16} {'tokens':>7} {'tokens':>7} {'tokens':>7} {'ms':>9} {'ms':>9} {'ms':>11}")
            print("\n".join(lines), end="\n\n", flush=True)
    except JmemserveError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
