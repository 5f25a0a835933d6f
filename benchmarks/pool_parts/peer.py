"""The second process of a pair (``worlds.py``): it makes a pool, says where it listens, and obeys until its input ends.

argv: JSON [way, shape]. Lines in and out are msgpack in hex; an answer is {"value": ...} or {"error": text}.
"""

import json
import sys
from typing import Any

import msgpack

from jmemserve.devices import arrange_cpu_devices
from jmemserve.errors import JmemserveError
from jmemserve.kernels.pages import PageLayout


def main() -> None:
    arrange_cpu_devices(1)
    from pool_parts.worlds import Shape, Ways, obey  # after the devices are arranged

    way, shape = json.loads(sys.argv[1])
    try:
        pool = Ways().pool("b", way, Shape(**shape | {"layout": PageLayout(**shape["layout"])}), 0)
    except JmemserveError as error:
        say({"error": str(error)})
        return
    with pool:
        say({"value": pool.address})
        for line in sys.stdin:
            try:
                say({"value": obey(pool, msgpack.unpackb(bytes.fromhex(line)))})
            except JmemserveError as error:
                say({"error": str(error)})


def say(answer: dict[str, Any]) -> None:
    print(msgpack.packb(answer).hex(), flush=True)


if __name__ == "__main__":
    main()
