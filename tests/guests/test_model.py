"""Specs are checked wherever they come from."""

from __future__ import annotations

import msgspec
import pytest

from haulier.errors import UsageError
from haulier.guests.model import GuestSpec, check_name, new_spec

GOOD = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30, address="10.77.0.10/24", gateway="10.77.0.1")


def test_new_specs_are_machines_of_their_own() -> None:
    other = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30)
    assert other.uuid != GOOD.uuid
    assert other.vmgenid != GOOD.vmgenid
    assert other.mac != GOOD.mac
    assert GOOD.mac.startswith("52:54:00:")
    assert GOOD.memory_bytes == 256 << 20


def test_a_spec_survives_its_own_encoding() -> None:
    assert msgspec.json.decode(msgspec.json.encode(GOOD), type=GuestSpec) == GOOD
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(GOOD), type=GuestSpec) == GOOD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "Web"),
        ("name", "-x"),
        ("name", "a/../b"),
        ("name", "web1\n"),
        ("name", "x" * 42),
        ("image", "../etc"),
        ("uuid", "1234"),
        pytest.param("uuid", GOOD.uuid.upper(), id="uuid-upper-case"),
        ("vmgenid", "auto"),
        ("golden", "x" * 64),
        ("golden", "../golden"),
        ("memory_mib", 0),
        ("memory_mib", 1 << 40),
        ("vcpus", 0),
        ("vcpus", 1000),
        ("disk_size", 0),
        ("disk_size", 513),
        ("disk_size", 1 << 60),
        ("mac", "52:54:00:00:00"),
        ("mac", "53:54:00:00:00:01"),
        ("mac", "52:54:00:00:00:01,romfile=x"),
        ("address", "10.77.0.10"),
        ("address", "10.77.0.10/40"),
        ("address", "10.77.0.10/24; reboot"),
        ("address", ""),
        ("address", "fe80::10/64"),
        ("address", "fd77::10%eth0/64"),
        ("address6", "fd77::10"),
        ("address6", "10.77.0.11/24"),
        ("gateway6", "fd77::1"),
        ("gateway", "10.78.0.1"),
        ("gateway", "10.77.0.10"),
        ("machine", "q35"),
        ("machine", "pc-q35-8.2,accel=kvm"),
        ("cpu", "host"),
        ("cpu", "max"),
        ("cpu", "Nehalem-v1,+vmx"),
    ],
)
def test_bad_fields_are_refused_also_in_messages(field: str, value: object) -> None:
    with pytest.raises(UsageError):
        msgspec.structs.replace(GOOD, **{field: value})
    data = msgspec.to_builtins(GOOD) | {field: value}
    # msgspec wraps what a struct's own check raises.
    with pytest.raises((UsageError, msgspec.ValidationError)):
        msgspec.convert(data, GuestSpec)


def test_the_error_names_the_thing_and_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"'Bad Name' cannot name a image: use 1 to 41"):
        check_name("Bad Name", "image")
    with pytest.raises(UsageError, match=r"'host' differs from host to host.*Nehalem-v1"):
        msgspec.structs.replace(GOOD, cpu="host")
