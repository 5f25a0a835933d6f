"""All instances of a deployment in this process."""

import functools
import time
from collections.abc import Callable

from jmemserve.config import InstanceSpec
from jmemserve.engine.build import build, check_host_memory, model_facts, model_folder, read_model_config
from jmemserve.engine.calibrating import calibrated
from jmemserve.engine.cluster import Cluster
from jmemserve.engine.compiles import CompileCounter, keep_compilations
from jmemserve.engine.instance import Instance
from jmemserve.engine.links import Exchange, LocalLinks, Side
from jmemserve.engine.local import Host
from jmemserve.engine.mesh import describe_devices
from jmemserve.engine.report import Report
from jmemserve.errors import Unavailable
from jmemserve.kvpool.transports.local import LocalExchange
from jmemserve.scheduler.messages import Beat, FromInstance, MemberState, ToInstance

START_S = 300.0  # for linking and probing


class LocalPort:
    """A ``Port`` to an instance of this process."""

    def __init__(self, cluster: Cluster, name: str):
        self._cluster, self._name = cluster, name
        self.host: Host | None = None

    def send(self, message: ToInstance) -> None:
        if self.host is not None:
            self.host.instance.post(message)

    def beat(self) -> Beat | None:
        return None if self.host is None else self.host.beat()

    def close(self, reason: str) -> None:
        pass  # its thread ends with the process, or when the cluster stops

    def say(self, message: FromInstance) -> None:
        try:
            self._cluster.on_message(self._name, self, message)
        except Unavailable:
            pass  # it is no member any more, and hears of it from nobody else

    def died(self, error: BaseException) -> None:
        self._cluster.down(self._name, self, f"its thread ended: {error!r}", error)


def start_instances(cluster: Cluster, report: Report) -> Callable[[], None]:
    """Build, introduce and probe every instance of the cluster's spec; what ends them again.

    Raises ConfigError or CheckpointError.
    """
    spec, engine = cluster.spec, cluster.spec.engine
    config = read_model_config(engine)
    cluster.folder, cluster.vocab_size = model_folder(engine), config.vocab_size
    if engine.compilation_cache_dir is not None:
        keep_compilations(engine.compilation_cache_dir)
    with report.phase("devices"):
        grid = describe_devices(spec)
    for line in grid:
        report.line(f"    {line}")
    check_host_memory(engine, len(spec.instances))
    epoch, ways, exchange = time.time_ns(), LocalExchange(), Exchange()
    facts = model_facts(engine, config)
    hosts: list[Host] = []

    def close() -> None:
        for host in hosts:
            host.close()
        counter.close()

    counter = CompileCounter()
    for instance in spec.instances:
        port = LocalPort(cluster, instance.name)
        parts = build(instance, engine, config, spec.num_devices, epoch, ways, report)
        parts = calibrated(parts, instance.name, engine, report)
        links = functools.partial(_links, instance, exchange)
        port.host = Host(instance, parts, links, port.say, port.died, counter)
        hosts.append(port.host)
        cluster.admit(instance.name, epoch, instance.role, facts, port, "this process")
        port.host.instance.start()
        cluster.on_message(instance.name, port, port.host.ready())
    if not cluster.wait_ready(len(hosts), START_S):
        bad = [f"{record.name}: {record.reason}" for record in cluster.members() if record.state is MemberState.DEAD]
        close()
        raise Unavailable("the instances cannot work together: " + ("; ".join(bad) or "no answer"))
    for record in cluster.members():
        for peer, way in record.ways.items():
            report.line(f"    {peer} gets blocks of {record.name} by {way}")
    counter.count = 0  # what comes now is a mistake
    for host in hosts:
        host.instance.call(host.instance.node.tally.reset)  # what moved so far was probes
    return close


def _links(instance: InstanceSpec, exchange: Exchange, side: Side) -> LocalLinks:
    return LocalLinks(instance.name, side, exchange)


def instances(cluster: Cluster) -> dict[str, Instance]:
    """The instances of this process, for tests and tools."""
    ports = {name: port for name, port in cluster._ports.items() if isinstance(port, LocalPort)}
    return {name: port.host.instance for name, port in ports.items() if port.host is not None}
