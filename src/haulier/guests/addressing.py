"""A guest's addresses under its clients' MPTCP connections, changed through its agent while they live on.

Joining: the guest takes an address of another site beside the one it has and announces it (MPTCP's ADD_ADDR); clients
connect to it, and their connections go by both. Leaving: the old address's subflows are closed (REMOVE_ADDR), then the
address. One NIC is enough, as a site's bridge is the guest's gateway everywhere.

Nothing is installed in the guest: its kernel does MPTCP, iproute2 the rest. Measured: one batch of `ip` is 80 ms under
TCG, and a client's new subflow is there 60 to 150 ms later.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from haulier.errors import GuestError, Unsupported
from haulier.guests.agent import GuestAgent
from haulier.session.mptcp import RECEIVE_BYTES

SUBFLOWS: Final = 8
"""The most that Linux lets a connection have; its default of 2 would not outlive two moves in a row."""
_PATH: Final = "PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH; "
_GENTLY: Final = _PATH + "{ echo 10 >/proc/self/autogroup; } 2>/dev/null; "
"""What serves clients goes first, as none of this is urgent: what is was left in the guest before it moved. The agent's
programs have a session of their own each, hence an autogroup, within which alone a nice value would count."""
_SETTINGS: Final = (
    "{ f=/proc/sys/net/ipv4/tcp_rmem; read -r least usual most <$f; "
    f'[ "$usual" -ge {RECEIVE_BYTES} ] || echo "$least {RECEIVE_BYTES} $most" >$f; }} 2>/dev/null; '
    "{ f=/proc/sys/net/mptcp/add_addr_timeout; read -r seconds <$f; "
    '[ "$seconds" = 120 ] && echo 1 >$f; } 2>/dev/null; '
)
"""For what clients send: a subflow that joins late has no more room than this. And the announcement of an address that
is lost, as a packet among those of a stream may be, is sent again after a second, not after Linux's two minutes."""
_BATCH: Final = _GENTLY + _SETTINGS + "exec ip -force -batch -"
_SOCKETS: Final = _GENTLY + "exec ss -HtniO state established"
_MARK: Final = "-- sockets"
_BOTH: Final = f"{_GENTLY}{_SETTINGS}ip -force -batch -; echo '{_MARK}'; exec ss -HtniO state established"
_ARMED: Final = "/run/haulier-arrival"
_ARRIVED: Final = (
    _PATH
    + _SETTINGS
    + f"""
lines=$(cat)
echo "$1" >{_ARMED}
timeout 900 ip -o monitor link dev "$0" | while read -r event; do
    case $event in *NOTIFY*PEERS*) ;; *) continue ;; esac
    read -r armed <{_ARMED} && [ "$armed" = "$1" ] && printf '%s\\n' "$lines"
    break
done 2>/dev/null | ip -force -batch -"""
)
"""Waits for what a NIC's driver says when its guest has come to another host (QEMU has it announce itself); the batch
of `ip` is there by then, and only reads on. Nothing is run that was armed before something else, or disarmed."""
_LOOK: Final = (
    _PATH
    + """
printf 'enabled '; cat /proc/sys/net/mptcp/enabled 2>/dev/null || echo absent
ip mptcp limits >/dev/null 2>&1 && echo tool
ss -HltniO 2>/dev/null | while read -r line; do echo "listen $line"; done
exit 0"""
)
_TOKEN = re.compile(r"tcp-ulp-mptcp\b.*?token:[0-9a-f]+\(id:\d+\)/([0-9a-f]+)\(id:")
_NUMBER = re.compile(r"[0-9]{1,5}")
_STEP_S: Final = 15.0


@dataclass(frozen=True)
class Ability:
    """What a guest has of that which its clients' connections need to move. Ports are those of TCP listeners."""

    kernel: bool
    tool: bool
    mptcp_ports: tuple[int, ...] = ()
    plain_ports: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        """Why no connection can move; empty if some can."""
        found = []
        if not self.kernel:
            found.append("its kernel has no MPTCP, or net.mptcp.enabled is 0 (Linux has it since 5.6)")
        if not self.tool:
            found.append("its iproute2 has no 'ip mptcp' (since 5.8)")
        return found

    def remarks(self) -> list[str]:
        """What stays as it is although the guest is able."""
        if self.kernel and not self.mptcp_ports:
            return ["no program in it listens with MPTCP: run one with mptcpize, or with GODEBUG=multipathtcp=1"]
        if self.plain_ports:
            ports = ", ".join(map(str, self.plain_ports[:8]))
            return [f"connections to the ports {ports} are plain TCP: they go by a tunnel until they end"]
        return []


@dataclass(frozen=True)
class Connections:
    """TCP sockets of a guest by local address: tokens of MPTCP connections with a subflow there; plain ones counted."""

    tokens: dict[str, set[str]] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)

    def without(self, old: str, new: str) -> int:
        """MPTCP connections that go by `old` and not by `new`."""
        return len(self.tokens.get(old, set()) - self.tokens.get(new, set()))


def ability(shown: str) -> Ability:
    """From what the look into a guest printed. Pure."""
    kernel = tool = False
    ports: dict[bool, set[int]] = {True: set(), False: set()}
    for line in shown.splitlines():
        word, _, rest = line.partition(" ")
        if word == "enabled":
            kernel = rest.strip() == "1"
        elif word == "tool":
            tool = True
        elif word == "listen" and len(columns := rest.split()) >= 4:
            host, _, port = columns[3].rpartition(":")
            if _NUMBER.fullmatch(port) and not _inside(host):
                ports["tcp-ulp-mptcp" in rest].add(int(port))
    return Ability(kernel, tool, tuple(sorted(ports[True])), tuple(sorted(ports[False] - ports[True])))


def connections(shown: str) -> Connections:
    """From the lines of `ss -HtniO state established`. Pure."""
    found = Connections()
    for line in shown.splitlines():
        columns = line.split()
        if len(columns) < 4:
            continue
        address = _bare(columns[2].rpartition(":")[0])
        if token := _TOKEN.search(line):
            found.tokens.setdefault(address, set()).add(token[1])
        else:
            found.plain[address] = found.plain.get(address, 0) + 1
    return found


def _bare(text: str) -> str:
    """An address as `ss` writes it, without brackets, zone, or the prefix of IPv4 in IPv6."""
    return text.strip("[]").partition("%")[0].removeprefix("::ffff:")


def _inside(host: str) -> bool:
    try:
        return ipaddress.ip_address(_bare(host)).is_loopback
    except ValueError:
        return False


def number_of(epoch: int) -> int:
    """The MPTCP id of the address that a guest takes for its stay with this epoch: not that of the stay before."""
    return 1 + epoch % 250


def numbers_of(epoch: int) -> list[int]:
    """All ids that it may have: a second one where it had to be announced again."""
    return [number_of(epoch), number_of(epoch + 62)]


def take_lines(nic: str, address: str, gateway: str = "") -> list[str]:
    """The guest has `address`. `gateway`: of IPv6, where its packets leave by; IPv4 has its default route. Pure."""
    length = ipaddress.ip_address(address).max_prefixlen
    lines = [f"addr replace {address}/{length} dev {nic}" + (" nodad" if length == 128 else "")]
    if gateway:
        lines.append(f"route replace default via {gateway} dev {nic}")
    return [*lines, f"mptcp limits set subflows {SUBFLOWS}"]


def join_lines(nic: str, address: str, number: int, *, backup: bool = False) -> list[str]:
    """Clients are told of `address`. As a backup it is joined and not used while another works. Pure."""
    words = "signal backup" if backup else "signal"
    return [
        f"mptcp endpoint add {address} id {number} dev {nic} {words}",
        f"mptcp endpoint change id {number} {'backup' if backup else 'nobackup'}",
    ]


def again_lines(nic: str, address: str, used: Sequence[int], epoch: int) -> list[str]:
    """Clients are told of `address` anew, of which nobody makes use; `used`: its ids as an endpoint. Pure.

    By another id: taking one back and giving it to the same address are two messages whose order nothing keeps.
    """
    first, second = numbers_of(epoch)
    number = first if second in used else second
    return [*(f"mptcp endpoint delete id {each}" for each in used), *join_lines(nic, address, number)]


def leave_lines(nic: str, address: str, numbers: Sequence[int]) -> list[str]:
    """MPTCP connections go by `address` no more; `numbers` are its ids as an endpoint. Pure.

    Id 0 is the address that a connection was opened to, whichever that is: hence the address is named as well.
    """
    return [f"mptcp endpoint delete id 0 {address}", *(f"mptcp endpoint delete id {n}" for n in numbers)]


def spare_lines(nic: str, address: str, number: int, others: Sequence[int] = ()) -> list[str]:
    """MPTCP connections use `address` only where nothing else works. `others`: ids that it may have already. Pure.

    Peers are told of a change alone (MP_PRIO), so the endpoint must not begin as a backup. What fails is left out.
    """
    changes = [f"mptcp endpoint change id {each} backup" for each in (number, *others)]
    return [f"mptcp endpoint add {address} id {number} dev {nic}", *changes]


def drop_lines(nic: str, address: str) -> list[str]:
    """The guest has `address` no more. Pure."""
    return [f"addr del {address}/{ipaddress.ip_address(address).max_prefixlen} dev {nic}"]


def endpoints(shown: str) -> dict[str, list[int]]:
    """Address -> its ids, from the lines of `ip mptcp endpoint show`. Pure."""
    found: dict[str, list[int]] = {}
    for line in shown.splitlines():
        columns = line.split()
        if len(columns) >= 3 and columns[1] == "id" and _NUMBER.fullmatch(columns[2]):
            found.setdefault(columns[0], []).append(int(columns[2]))
    return found


# -- with the agent inside --------------------------------------------------------------------------------------------


def nic_of(agent: GuestAgent, mac: str) -> str:
    """The name of the interface with `mac` inside the guest. GuestError if there is none."""
    found: Any = agent.execute("guest-network-get-interfaces")
    for entry in found if isinstance(found, list) else ():
        if not isinstance(entry, dict) or entry.get("hardware-address") != mac:
            continue
        name = entry.get("name")
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", name):
            return name
    raise GuestError(f"the guest shows no network interface with the MAC {mac}: is its NIC unplugged, or renamed?")


def batch(agent: GuestAgent, lines: Sequence[str]) -> tuple[str, str]:
    """Runs lines of `ip` inside, all of them whichever fail: what was printed, and what failed."""
    done = agent.run(["/bin/sh", "-c", _BATCH], ("\n".join(lines) + "\n").encode(), _STEP_S)
    return done.out.decode(errors="replace"), done.err.decode(errors="replace").strip()


def change(agent: GuestAgent, lines: Sequence[str]) -> tuple[str, str, Connections]:
    """`batch`, and how connections were right after it: each program that the guest starts costs it a moment."""
    done = agent.run(["/bin/sh", "-c", _BOTH], ("\n".join(lines) + "\n").encode(), _STEP_S)
    said, mark, shown = done.out.decode(errors="replace").partition(_MARK)
    if not mark or done.code:
        raise GuestError(f"the guest cannot show its connections: {done.err.decode(errors='replace').strip()[-200:]}")
    return said, done.err.decode(errors="replace").strip(), connections(shown)


def arm(agent: GuestAgent, nic: str, lines: Sequence[str]) -> None:
    """These lines of `ip` are run the moment the guest has arrived somewhere, before its agent can be asked.

    Only the last ones that were armed, within a quarter of an hour, and once.
    """
    data = base64.b64encode(("\n".join(lines) + "\n").encode()).decode()
    words = ["-c", _ARRIVED, nic, secrets.token_hex(8)]
    agent.execute("guest-exec", {"path": "/bin/sh", "arg": words, "input-data": data})


def disarm(agent: GuestAgent) -> None:
    """Nothing is run when the guest arrives somewhere."""
    agent.run(["/bin/rm", "-f", _ARMED], timeout=_STEP_S)


def look(agent: GuestAgent) -> Ability:
    """What this guest has. GuestError if its agent may run nothing, as some distributions have it."""
    return ability(agent.run(["/bin/sh", "-c", _LOOK], timeout=_STEP_S).out.decode(errors="replace"))


def sockets(agent: GuestAgent) -> Connections:
    """Its connections now. GuestError if it has no `ss`."""
    return connections(agent.check(["/bin/sh", "-c", _SOCKETS], timeout=_STEP_S).decode(errors="replace"))


def check(agent: GuestAgent) -> Ability:
    """`look`, or Unsupported if no connection of this guest could move."""
    found = look(agent)
    if problems := found.problems():
        raise Unsupported(f"its clients' connections cannot follow it by MPTCP: {'; '.join(problems)}")
    return found
