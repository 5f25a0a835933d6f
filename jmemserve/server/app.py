"""One server process, from the open port to the exit code.

listen (LOADING) -> load -> SERVING -> signal -> DRAINING -> streams end -> exit 0
                      |                   |
                      |                   +-- second signal: exit at once, 0
                      +-- bad model: one sentence, 2        engine dies: first traceback last, 1
"""

import asyncio
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable

from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine.build import model_folder
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import Report
from jmemserve.server.flags import ServeConfig
from jmemserve.server.frontend import Frontend
from jmemserve.server.grpc_server import GrpcServer
from jmemserve.server.model import load_model
from jmemserve.server.text import eos_ids, load_text

SAME_SIGNAL_S = 0.3  # a signal that follows another one so soon is no second wish
FLUSH_S = 5.0  # what streams get to send their last messages, once nothing runs any more


async def run(config: ServeConfig, report: Report) -> int:
    """Serve until a signal comes or the engine dies. Returns the exit code.

    Raises Unavailable if the port cannot be had, ConfigError or CheckpointError if the model cannot be served.
    """
    arrange_cpu_devices(config.cluster.num_devices)
    frontend = Frontend(config.cluster)
    server = GrpcServer(frontend)
    stop = _catch_signals()
    port = await server.start(config.host, config.port)
    address = _address(config.host, port)
    report.line(f"jmemserve listens on {address} and loads {config.served_model_name!r} on {config.mesh}")
    if not config.is_loopback:
        report.line(f"warning: other machines can reach {config.host}, and there is no TLS and no login")
    try:
        cluster = await _load(config, report, frontend, stop)
        await server.publish()
        report.line(_how_to_call(config.host, port, frontend.model.text is not None))
        await _first_of(stop.wait(), frontend.ended.wait())
        if frontend.failure is None:
            await _drain(config, report, frontend, server, stop)
        await server.publish()
    finally:
        await server.stop(FLUSH_S)
    if frontend.failure is not None:
        _print_failure(frontend.failure)
        return 1
    await asyncio.to_thread(cluster.stop)
    report.line("stopped")
    return 0


async def _load(config: ServeConfig, report: Report, frontend: Frontend, stop: asyncio.Event) -> Cluster:
    """Start the engine and open the front-end, or end the process if ``stop`` is set before."""
    folder = model_folder(config.cluster.engine)
    text = load_text(folder)
    eos_ids(folder, text)  # whatever is wrong with these files is said before the long work
    cluster = Cluster(config.cluster, report, frontend.on_events)
    cluster.on_failure = frontend.on_failure
    loading = asyncio.ensure_future(_on_daemon_thread(cluster.start))
    await _first_of(loading, stop.wait())
    if stop.is_set():
        _leave_at_once()  # compiling cannot be interrupted, and nobody waits for an answer
    loading.result()
    if text is None:
        report.line("there is no tokenizer.json: requests must give token ids")
    vocab_size, max_model_len = cluster.vocab_size, cluster.max_model_len
    frontend.open(cluster, load_model(config.served_model_name, vocab_size, max_model_len, cluster.folder, text))
    return cluster


async def _drain(
    config: ServeConfig, report: Report, frontend: Frontend, server: GrpcServer, stop: asyncio.Event
) -> None:
    """Finish what runs; a second signal ends the process."""
    stop.clear()
    report.line(f"draining: {frontend.num_calls} calls in flight, at most {config.shutdown_timeout_s:g} s")
    draining = asyncio.ensure_future(frontend.drain(config.shutdown_timeout_s))
    await asyncio.sleep(0)  # the state changes before it is published
    await server.publish()
    await _first_of(draining, stop.wait(), frontend.ended.wait())
    if stop.is_set():
        await server.stop(0)  # streams end with a status, not with a broken connection
        _leave_at_once()


def _catch_signals() -> asyncio.Event:
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


async def _first_of(*waits: Awaitable[object]) -> None:
    """Return when one of ``waits`` is done. Coroutines among them are cancelled then; futures go on."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


async def _on_daemon_thread(work: Callable[[], None]) -> None:
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
        loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=body, name="load", daemon=True).start()
    await done


def _leave_at_once() -> None:
    """End the process without waiting for threads that cannot be interrupted."""
    sys.stdout.flush()
    sys.stderr.write("stopped at once\n")
    sys.stderr.flush()
    os._exit(0)


def _print_failure(failure: BaseException) -> None:
    """The cause of the end, last on the screen."""
    sys.stderr.write("the engine failed; this was the first error:\n")
    traceback.print_exception(failure, file=sys.stderr)
    sys.stderr.flush()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _how_to_call(host: str, port: int, has_text: bool) -> str:
    # A server that listens everywhere is called by one of its addresses.
    address = _address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
    prompt = '--prompt "Once upon a time"' if has_text else "--tokens 1,2,3"
    return f"ready; try:\n  {sys.executable} -m jmemserve.client --address {address} {prompt} --max-tokens 64"
