"""What CRIU is asked for when a container is dumped, byte for byte as its protocol has it."""

from __future__ import annotations

from pathlib import Path

from haulier.containers.dumping import DumpRequest
from haulier.containers.protobuf import fields


def test_a_request_says_what_lies_outside() -> None:
    request = DumpRequest(
        77, Path("/root fs"), Path("/criu.conf"), Path("/cg"), external=("net[5]:extRootNetNS",), masked=("/proc/keys",)
    )
    said = fields(request.encode(3, 4))
    assert said[1] == 1
    options = fields(bytes(said[2]))  # type: ignore[arg-type]
    # Numbers of images/rpc.proto: directories, process, left running, notified, control groups.
    assert (options[1], options[17], options[2], options[3], options[12], options[24]) == (3, 4, 77, 1, 1, 1)
    assert options[13] == b"/root fs" and options[51] == b"/criu.conf" and options[44] == b"/cg"
    assert options[37] == b"net[5]:extRootNetNS"
    assert fields(bytes(options[23])) == {1: b"/proc/keys", 2: b"/dev/null"}  # type: ignore[arg-type]
