"""The checked-in generated code is that of the proto, and the proto keeps the rules of a good one."""

import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from jmemserve.server import genproto
from jmemserve.server import jmemserve_pb2 as pb
from jmemserve.server import jmemserve_pb2_grpc as pb_grpc

SOURCE = Path(genproto.__file__).with_name("jmemserve.proto").read_text()


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """Compared as descriptors, so that any version of the compiler can check."""
    pytest.importorskip("grpc_tools")
    genproto.run_protoc([f"--descriptor_set_out={tmp_path / 'set'}"])
    [file] = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    checked_in = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(checked_in)
    file.ClearField("source_code_info")
    for message in (*file.message_type, *checked_in.message_type):
        for field in message.field:
            field.ClearField("json_name")
    assert file == checked_in, "run: python -m jmemserve.server.genproto"
    for service in pb.DESCRIPTOR.services_by_name.values():
        servicer = getattr(pb_grpc, f"{service.name}Servicer")
        assert {name for name in vars(servicer) if name[0] != "_"} == {method.name for method in service.methods}


def test_a_comment_on_everything() -> None:
    lines = SOURCE.splitlines()
    wanted = re.compile(r"\s*(message|enum|service|rpc|oneof|\w[\w.]* \w+ = \d+|(optional|repeated) |[A-Z_]+ = \d+)")
    missing = [
        line for before, line in zip(lines, lines[1:], strict=False) if wanted.match(line) and "//" not in before
    ]
    assert missing == []


def test_names() -> None:
    """What buf calls STANDARD, but for service names, which are short on purpose."""
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(prefix + "_") for value in enum.values)
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"
