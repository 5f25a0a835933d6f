"""``python -m jmemserve.serve``: flags to a running server."""

import asyncio
import signal
import sys
from collections.abc import Sequence

from jmemserve.errors import ConfigError, JmemserveError
from jmemserve.server.flags import dump_config, parse_flags


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code.

    0: drained; 1: the port is in use, or the engine failed; 2: a flag, file or model cannot be used.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server listens to signals itself
    try:
        config, only_print = parse_flags(argv)
        if only_print:
            print(dump_config(config), end="")
            return 0
        # Imported late: a wrong flag is answered at once, and JAX starts with the devices that the mesh needs.
        from jmemserve.engine.report import ConsoleReport

        if config.instance is not None:
            from jmemserve.server import worker

            return asyncio.run(worker.run(config, ConsoleReport()))
        from jmemserve.server.app import run

        return asyncio.run(run(config, ConsoleReport()))
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 0
    except ConfigError as error:
        print(f"jmemserve: {error}", file=sys.stderr)
        return 2
    except JmemserveError as error:
        print(f"jmemserve: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
