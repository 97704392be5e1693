"""What is sent into a clone. That it works there is shown by the system tests."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from haulier.guests.identity import ENTROPY, Identity, script
from haulier.guests.model import new_spec

SPEC = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30, address="10.77.0.10/24", gateway="10.77.0.1")
V4 = "route replace default via 10.77.0.1 dev eth0"
V6 = "route replace default via fd77::1 dev eth0"


def test_identities_are_fresh() -> None:
    one, two = Identity.fresh(SPEC), Identity.fresh(SPEC)
    assert one.name == two.name == "web1"
    assert one.machine_id != two.machine_id
    assert len(one.machine_id) == 32
    assert one.ssh_key != two.ssh_key
    private = load_ssh_private_key(one.ssh_key.encode(), None)
    public = load_ssh_public_key(one.ssh_pub.encode())
    assert private.public_key() == public


def test_without_a_nic_there_is_no_address() -> None:
    one = Identity.fresh(SPEC, nic=False)
    assert (one.mac, one.address, one.gateway) == ("", "", "")


def test_the_script_is_sound_shell() -> None:
    text = script(Identity.fresh(SPEC), bytes(ENTROPY), 1234.5)
    done = subprocess.run(["sh", "-n"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_values_cannot_break_out_of_their_quotes() -> None:
    nasty = "x'; touch /tmp/owned; echo '$(id)`id`\\"
    one = replace(Identity.fresh(SPEC), name=nasty, address=nasty)
    text = script(one, b"\xff\x00", None)
    head = text[: text.index(b"# Makes a restored clone")]
    shown = subprocess.run(
        ["sh"],
        input=head + b'printf "%s|%s|%s|%s" "$name" "$address" "$entropy_hex" "$now"',
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode() == f"{nasty}|{nasty}|ff00|"


@pytest.mark.parametrize(
    ("address", "address6", "lines"),
    [
        ("10.77.0.10/24", "", ["address add 10.77.0.10/24 broadcast + dev eth0", V4]),
        ("fd77::10/64", "", ["address add fd77::10/64 dev eth0 nodad", V6]),
        (
            "10.77.0.10/24",
            "fd77::10/64",
            ["address add 10.77.0.10/24 broadcast + dev eth0", V4, "address add fd77::10/64 dev eth0 nodad", V6],
        ),
    ],
)
def test_a_clone_takes_its_addresses_of_either_family(address: str, address6: str, lines: list[str]) -> None:
    gateways = {"10.77.0.10/24": "10.77.0.1", "fd77::10/64": "fd77::1", "": ""}
    spec = msgspec.structs.replace(
        SPEC, address=address, gateway=gateways[address], address6=address6, gateway6=gateways[address6]
    )
    text = script(Identity.fresh(spec), b"", None).decode()
    head = text[: text.index("# Makes a restored clone")]
    functions = text[text.index("# Calls a function with each") : text.index("# For the next boots")]

    def shown(function: str) -> list[str]:
        given = f"{head}nic=eth0\n{functions}each_address {function}\n"
        return subprocess.run(
            ["sh", "-eu"], input=given, capture_output=True, check=True, text=True
        ).stdout.splitlines()

    assert shown("line") == lines
    families = [("inet6" if ":" in each else "inet") for each in (address, address6) if each]
    assert [line for line in shown("stanza") if "iface" in line] == [f"iface eth0 {each} static" for each in families]
    assert [line for line in shown("unit") if "Address" in line] == [
        f"Address={each}" for each in (address, address6) if each
    ]


def test_entropy_is_more_than_the_generator_holds() -> None:
    assert ENTROPY >= 64
    text = script(Identity.fresh(SPEC), bytes(range(ENTROPY)), 0.0).decode()
    assert bytes(range(ENTROPY)).hex() in text
    # The steps that count come in this order: randomness, then all that might draw on it, the network last.
    order = [
        text.index(part) for part in ("\nreseed ||", "random-seed", "/etc/machine-id", "ssh_host_ed25519", "link set")
    ]
    assert order == sorted(order)


def test_the_key_is_on_no_command_line() -> None:
    """Other users of the guest read command lines; the script comes through standard input."""
    text = script(Identity.fresh(SPEC), bytes(ENTROPY), 0.0).decode()
    for line in text.splitlines():
        if "$ssh_key" in line:
            assert "printf" in line or "-n" in line  # shell builtins: no process of their own
