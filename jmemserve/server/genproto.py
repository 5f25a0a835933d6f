"""Regenerates the code of jmemserve.proto: ``python -m jmemserve.server.genproto`` (needs grpcio-tools).

Generated code runs with the protobuf and grpcio it was made by and with newer ones, so it is made with the oldest
that are supported: grpcio-tools 1.72, whose compiler is protobuf 30 (6.30 in Python).
"""

import sys
from importlib import metadata, resources
from pathlib import Path

from jmemserve.errors import ConfigError

PROTO = "jmemserve/server/jmemserve.proto"
COMPILER = "1.72."


def run_protoc(arguments: list[str]) -> None:
    """Run the protobuf compiler on the proto with the repository as its root. Raises ConfigError if it fails."""
    try:
        from grpc_tools import protoc
    except ImportError:
        raise ConfigError("grpcio-tools is not installed; try: pip install 'grpcio-tools==1.72.*'") from None
    root = Path(__file__).parents[2]
    # The full path from the root makes the generated import absolute; nothing has to be patched afterwards.
    includes = [f"-I{root}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *includes, *arguments, str(root / PROTO)]) != 0:
        raise ConfigError(f"the protobuf compiler refused {PROTO}; its message is above")


def main() -> int:
    """Write jmemserve_pb2.py, jmemserve_pb2.pyi and jmemserve_pb2_grpc.py next to the proto."""
    root = Path(__file__).parents[2]
    try:
        have = metadata.version("grpcio-tools")
        if not have.startswith(COMPILER):
            raise ConfigError(
                f"grpcio-tools {have} would make code that needs newer libraries than pyproject.toml asks for; "
                f"try: pip install 'grpcio-tools=={COMPILER}*'"
            )
        run_protoc([f"--python_out={root}", f"--pyi_out={root}", f"--grpc_python_out={root}"])
    except (ConfigError, metadata.PackageNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
