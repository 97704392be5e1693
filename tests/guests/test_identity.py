"""What is sent into a clone. That it works there is shown by the system tests."""

from __future__ import annotations

import subprocess
from dataclasses import replace

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from haulier.guests.identity import ENTROPY, Identity, script
from haulier.guests.model import new_spec

SPEC = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30, address="10.77.0.10/24", gateway="10.77.0.1")


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
