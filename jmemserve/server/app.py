"""One server process, from the open port to the exit code.

listen (LOADING) -> load -> SERVING -> signal -> DRAINING -> streams end -> exit 0
                      |                   |
                      |                   +-- second signal: exit at once, 0
                      +-- bad model: one sentence, 2        engine dies: first traceback last, 1
"""

import asyncio
import os
import secrets
import sys
import traceback

from jmemserve.devices import arrange_cpu_devices
from jmemserve.engine import garbage
from jmemserve.engine.build import model_facts, model_folder, read_model_config
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.report import Report
from jmemserve.scheduler.following import Following
from jmemserve.server.flags import Processes, ProcessRole, ServeConfig
from jmemserve.server.frontend import Frontend
from jmemserve.server.grpc_server import GrpcServer
from jmemserve.server.model import load_model
from jmemserve.server.net.attending import Attending
from jmemserve.server.net.joining import doors
from jmemserve.server.net.secret import load_secret, make_secret
from jmemserve.server.signals import catch_signals, first_of, on_daemon_thread
from jmemserve.server.supervisor import Supervisor
from jmemserve.server.text import Text, eos_ids, load_text

FLUSH_S = 5.0  # what streams get to send their last messages, once nothing runs any more


async def run(config: ServeConfig, report: Report) -> int:
    """Serve until a signal comes or the engine dies. Returns the exit code.

    Raises Unavailable if the port cannot be had, ConfigError or CheckpointError if the model cannot be served.
    """
    alone = config.role is None and config.processes is Processes.ONE
    if alone:
        arrange_cpu_devices(config.cluster.num_devices)
    frontend = Frontend(config.cluster)
    following = Following(config.join, config.cluster.engine.heartbeat_timeout_s) if config.join is not None else None
    cluster = Cluster(config.cluster, report, frontend.on_events, "" if alone else secrets.token_hex(4), following)
    cluster.on_failure = frontend.on_failure
    supervised = config.processes is Processes.PER_INSTANCE
    secret = b"" if alone else make_secret() if supervised else load_secret(config.secret_file)
    facts = () if alone else model_facts(config.cluster.engine, read_model_config(config.cluster.engine))
    server = GrpcServer(frontend, () if alone else doors(cluster, following, secret, facts))
    stop = catch_signals()
    port = await server.start(config.host, config.port)
    address = _address(config.host, port)
    lonely = config.role is ProcessRole.FRONTEND
    what, where = ("waits for instances of", "") if lonely else ("loads", f" on {config.mesh}")
    report.line(f"jmemserve listens on {address} and {what} {config.served_model_name!r}{where}")
    if not config.is_loopback:
        report.line(f"warning: other machines can reach {config.host}, and there is no TLS and no login")
    supervisor: Supervisor | None = None
    attending: asyncio.Future[None] | None = None
    try:
        model_text = _load_text(config)
        if alone:
            await _start_here(cluster, stop)
        else:
            cluster.listen(model_folder(config.cluster.engine), read_model_config(config.cluster.engine).vocab_size)
            if supervised:
                supervisor = Supervisor(config, report, _address(_callable(config.host), port), secret)
                supervisor.start()
            elif following is not None:
                attending = asyncio.ensure_future(Attending(cluster, following, facts, secret, report).run())
            else:
                report.line(_how_to_join(config, port))
            if not await _await_instances(config, cluster, stop, supervisor, attending):
                return _end_before_serving(supervisor)
            cluster.open()
        _open(config, report, frontend, cluster, model_text)
        garbage.settle()
        await server.publish()
        report.line(_how_to_call(config.host, port, frontend.model.text is not None))
        watching = asyncio.ensure_future(_watch(supervisor, cluster))
        await first_of(stop.wait(), frontend.ended.wait())
        watching.cancel()
        if frontend.failure is None:
            await _drain(config, report, frontend, server, stop)
        await server.publish()
    finally:
        if attending is not None:
            attending.cancel()
        if supervisor is not None:
            await asyncio.to_thread(cluster.stop)
            await supervisor.stop()
        await server.stop(FLUSH_S)
    if frontend.failure is not None:
        _print_failure(frontend.failure, supervisor)
        return 1
    await asyncio.to_thread(cluster.stop)
    report.line("stopped")
    return 0


def _load_text(config: ServeConfig) -> Text | None:
    """The tokenizer; whatever is wrong with the model's small files is said before the long work."""
    folder = model_folder(config.cluster.engine)
    text = load_text(folder)
    eos_ids(folder, text)
    return text


async def _start_here(cluster: Cluster, stop: asyncio.Event) -> None:
    """Start the instances in this process, or end it if ``stop`` is set before."""
    loading = asyncio.ensure_future(on_daemon_thread(cluster.start))
    await first_of(loading, stop.wait())
    if stop.is_set():
        _leave_at_once()  # compiling cannot be interrupted, and nobody waits for an answer
    loading.result()


async def _await_instances(
    config: ServeConfig,
    cluster: Cluster,
    stop: asyncio.Event,
    supervisor: Supervisor | None,
    attending: asyncio.Future[None] | None,
) -> bool:
    """Wait for all supervised instances, or for the first one that joins or is attended. False if that will not be.

    Raises ConfigError if the primary front-end does not take this one.
    """
    wanted = len(config.cluster.instances) if supervisor is not None else 1
    gave_up = supervisor.gave_up if supervisor is not None else asyncio.Event()
    while not stop.is_set() and not gave_up.is_set():
        if await asyncio.to_thread(cluster.wait_ready, wanted, 0.3):
            return True
        if attending is not None and attending.done():
            attending.result()
    return False


def _end_before_serving(supervisor: Supervisor | None) -> int:
    if supervisor is None or not supervisor.gave_up.is_set():
        sys.stderr.write("stopped before any instance was ready\n")
        return 0
    if supervisor.first_traceback:
        sys.stderr.write(f"this was the first error:\n{supervisor.first_traceback}\n")
    return 1


async def _watch(supervisor: Supervisor | None, cluster: Cluster) -> None:
    """Once no instance can be started any more, requests do not wait for one."""
    if supervisor is not None:
        await supervisor.none_left.wait()
        cluster.expect_no_more()


def _open(config: ServeConfig, report: Report, frontend: Frontend, cluster: Cluster, text: Text | None) -> None:
    if text is None:
        report.line("there is no tokenizer.json: requests must give token ids")
    name, folder = config.served_model_name, cluster.folder
    frontend.open(cluster, load_model(name, cluster.vocab_size, cluster.max_model_len, folder, text))


async def _drain(
    config: ServeConfig, report: Report, frontend: Frontend, server: GrpcServer, stop: asyncio.Event
) -> None:
    """Finish what runs; a second signal ends the process."""
    stop.clear()
    report.line(f"draining: {frontend.num_calls} calls in flight, at most {config.shutdown_timeout_s:g} s")
    draining = asyncio.ensure_future(frontend.drain(config.shutdown_timeout_s))
    await asyncio.sleep(0)  # the state changes before it is published
    await server.publish()
    await first_of(draining, stop.wait(), frontend.ended.wait())
    if stop.is_set():
        await server.stop(0)  # streams end with a status, not with a broken connection
        _leave_at_once()


def _leave_at_once() -> None:
    """End the process without waiting for threads that cannot be interrupted."""
    sys.stdout.flush()
    sys.stderr.write("stopped at once\n")
    sys.stderr.flush()
    os._exit(0)


def _print_failure(failure: BaseException, supervisor: Supervisor | None) -> None:
    """The cause of the end, last on the screen."""
    if supervisor is not None and supervisor.first_traceback:
        sys.stderr.write(f"the instances failed; this was the first error:\n{supervisor.first_traceback}\n")
        return
    sys.stderr.write("the engine failed; this was the first error:\n")
    traceback.print_exception(failure, file=sys.stderr)
    sys.stderr.flush()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _callable(host: str) -> str:
    """A server that listens everywhere is called by one of its addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _how_to_join(config: ServeConfig, port: int) -> str:
    address = _address(_callable(config.host), port)
    model = f" --model {config.cluster.engine.model}"
    return f"for an instance, run:\n  {sys.executable} -m jmemserve.serve --role prefill --join {address}{model}"


def _how_to_call(host: str, port: int, has_text: bool) -> str:
    address = _address(_callable(host), port)
    prompt = '--prompt "Once upon a time"' if has_text else "--tokens 1,2,3"
    return f"ready; try:\n  {sys.executable} -m jmemserve.client --address {address} {prompt} --max-tokens 64"
