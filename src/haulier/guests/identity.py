"""Gives a clone of a golden snapshot its own identity, through its guest agent, before its network is plugged in.

All clones of a snapshot wake up with the same memory: the same state of the random number generator, the same host
keys, the same names. What is renewed: randomness (64 bytes and more from the host, credited and put to use at once),
host name, machine id, SSH host keys, clock, address. What is not: the kernel's boot id and layout, and whatever
programs of the image hold in their own memory; executables in the image's /etc/haulier/clone.d are run for those.
"""

from __future__ import annotations

import os
import shlex
import time
import uuid
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from haulier.errors import GuestError
from haulier.guests.agent import GuestAgent
from haulier.guests.model import GuestSpec

ENTROPY: Final = 128
"""Bytes of fresh randomness; the kernel's generator has a state of 32 and mixes up to its input pool of 64."""
_SHELL: Final = "/bin/sh"
_STEPS_S: Final = 60.0


@dataclass(frozen=True)
class Identity:
    """What makes a machine itself. "" leaves a thing as it is."""

    name: str
    machine_id: str
    ssh_key: str
    ssh_pub: str
    mac: str
    address: str
    gateway: str
    address6: str
    gateway6: str

    @classmethod
    def fresh(cls, spec: GuestSpec, *, nic: bool = True) -> Identity:
        """A new one for `spec`: names and address from it, keys and ids nobody has seen."""
        private, public = _ssh_keys(spec.name)
        return cls(
            name=spec.name,
            machine_id=uuid.uuid4().hex,
            ssh_key=private,
            ssh_pub=public,
            mac=spec.mac if nic else "",
            address=spec.address if nic else "",
            gateway=spec.gateway if nic else "",
            address6=spec.address6 if nic else "",
            gateway6=spec.gateway6 if nic else "",
        )


def script(identity: Identity, entropy: bytes, now: float | None) -> bytes:
    """What /bin/sh inside the guest reads: quoted assignments, then the steps. `now` in seconds since the epoch.

    It goes through standard input, so that no other process of the guest sees the key on a command line.
    """
    values = {
        "entropy_hex": entropy.hex(),
        "name": identity.name,
        "machine_id": identity.machine_id,
        "now": "" if now is None else f"{now:.6f}",
        "ssh_key": identity.ssh_key.strip(),
        "ssh_pub": identity.ssh_pub.strip(),
        "mac": identity.mac,
        "address": identity.address,
        "gateway": identity.gateway,
        "address6": identity.address6,
        "gateway6": identity.gateway6,
    }
    head = "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items())
    steps = files("haulier.guests").joinpath("identity.sh").read_text()
    return (head + steps).encode()


def inject(agent: GuestAgent, identity: Identity, *, timeout: float = _STEPS_S) -> str:
    """Run the steps inside the guest; what they said. Raises `GuestError` naming the steps that failed.

    A guest whose randomness or keys were not renewed must not get its network: callers unplug it on an error.
    """
    done = agent.run([_SHELL], script(identity, os.urandom(ENTROPY), time.time()), timeout)
    said = done.err.decode(errors="replace").strip()
    if done.code:
        raise GuestError(f"{done.code} steps of giving {identity.name} its identity failed: {said[-500:]}")
    return done.out.decode(errors="replace").strip()


def _ssh_keys(comment: str) -> tuple[str, str]:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return private, f"{public} root@{comment}"
