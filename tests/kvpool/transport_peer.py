"""A second process for the contract of the transports: it publishes pieces until it is told to end, or killed.

argv: name of the transport. Standard input, a line each: publish KEY N FRAMES SEED | release KEY.
Standard output, a line each, msgpack in hex: first the endpoint, then a ticket (or None) per line read.
"""

import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import msgpack  # noqa: E402
from transport_ways import make_piece, make_transport, sharding  # noqa: E402


def main() -> None:
    transport = make_transport(sys.argv[1])
    _say(transport.endpoint())
    for line in sys.stdin:
        verb, key, *rest = line.split()
        if verb == "release":
            transport.release(key)
            _say(None)
        else:
            n, frames, seed = map(int, rest)
            piece = jax.device_put(make_piece(n, "float32", seed), sharding(2))
            _say(transport.publish(key, piece, frames))
    transport.close()


def _say(value: object) -> None:
    print(msgpack.packb(value).hex(), flush=True)


main()
