"""A site's directory: what lies where, and the settings in ``site.toml``.

site.toml      name, control address, bulk addresses, paths, moved_hook, store budget, cache policy
tls/           ca.pem, site.pem, site.key; ca.key only at the site that made the fleet
journal.sqlite who owns which guest, handoffs, known sites
store/         chunks and manifests
golden/<id>/   memory of images booted to idle
guests/<name>/ one guest's overlay, sockets, logs
handoffs/<id>/ job.json, status.json, report.json, worker.log
retained/      memory left behind by guests that moved away
attempts/      memory left by handoffs that came to nothing, and by prefetches
run/agent.sock the local control socket
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from haulier.durable import write_atomically
from haulier.errors import Conflict, Corrupt, UnknownThing, UsageError
from haulier.network import addresses
from haulier.network.pool import Pool
from haulier.network.rules import AUTO, Rule, read_rules
from haulier.policy.model import check_policy

DEFAULT_ROOT = Path("/var/lib/haulier")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_OPTIONAL = ("ram", "coordinator", "database", "cache_policy")
_SOCKET_LIMIT = 100
"""sun_path holds 108 bytes; a little is left for suffixes."""


def check_name(name: str, what: str) -> str:
    """`name` if it is a well-formed name of a site, guest or image; UsageError otherwise."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = str(name)[:60]
        raise UsageError(
            f"bad {what} name {shown!r}: use 1 to 41 of a-z, 0-9 and '-', beginning with a letter or a digit"
        )
    return name


def check_host(host: str, what: str) -> str:
    """`host` if it is an IP address or a host name; UsageError otherwise."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise UsageError(f"bad {what} {host[:80]!r}: give an IP address or a host name") from None
    return host


def check_transport(transport: str) -> str:
    """`transport` if there is one of that name; UsageError otherwise."""
    if transport not in ("striping", "mptcp"):
        raise UsageError(f"there is no transport {transport[:40]!r}: give striping or mptcp")
    return transport


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT`` as (host, port); UsageError otherwise."""
    host, colon, port_text = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        raise UsageError(f"bad address {address[:80]!r}: give HOST:PORT, with a port between 1 and 65535")
    return check_host(host, "address"), int(port_text)


def default_root() -> Path:
    """$HAULIER_ROOT, or /var/lib/haulier."""
    return Path(os.environ.get("HAULIER_ROOT") or DEFAULT_ROOT)


@dataclass(frozen=True)
class Site:
    """One site as configured on this host.

    `control` is "host:port" of the HTTPS API; `bulk` are the addresses on which handoffs arrive, one for each
    path (at least one: the control host, if none is configured; "auto": those of all uplinks of the host);
    `store_budget` is in bytes, 0 = no limit.
    """

    root: Path
    name: str
    control: str
    bulk: tuple[str, ...] = ()
    moved_hook: str = ""
    store_budget: int = 0
    ram: str = field(default="", repr=False)
    """Directory for guest memory; empty = a directory of this site in /dev/shm."""
    origin: str = ""
    """An object store that holds chunks as well, ``s3://BUCKET/PREFIX``; empty = none."""
    origin_endpoint: str = ""
    """Where that object store answers, if not where S3 does."""
    origin_cost: int = 1
    """0 = ask it like a site; else only for what no site that answers holds."""
    coordinator: str = ""
    """Where the fleet's coordinator is (see coordinator.address): https://HOST:PORT, "here", or "" for none."""
    database: str = field(default="", repr=False)
    """Of a coordinator at this site: postgresql://..., or empty for a file of its own."""
    cache_policy: str = ""
    """Of haulier.policy; empty = the default."""
    transport: str = ""
    """"striping" (also when empty) or "mptcp": how bytes go over several paths, unless a handoff says otherwise."""
    tunnel_idle_s: int = 86_400
    """A tunnel that keeps a guest's address goes after so many seconds without a packet; 0 = never."""
    paths: tuple[Rule, ...] = ()
    """Caps and costs of uplinks, ``[[path]]`` in site.toml."""
    pool: str = ""
    """Addresses that the network leads to this site, for guests here: a subnet, or FIRST-LAST. Empty = none."""
    guest_addresses: str = ""
    """What ``--address auto`` chooses from, in the guests' subnet; others at each site, as guests take them along."""
    dhcp: bool = False
    """Guests here get their addresses by DHCP too: dnsmasq on their bridge."""
    keep_bytes: int = 8 << 30
    """Budget of `retained` and `attempts` together; 0 = keep nothing of attempts."""
    keep_s: int = 3 * 86400
    """Age at which they go."""
    cpu_cap: float = 0.0
    """Cores that the memory codec of a handoff from here may use, 0.1 to 1; 0 = one."""

    def __post_init__(self) -> None:
        check_name(self.name, "site")
        host, _ = split_address(self.control)
        if not self.bulk:
            object.__setattr__(self, "bulk", (host,))
        for address in self.bulk:
            check_host(address, "bulk address")
        if AUTO in self.bulk and len(self.bulk) > 1:
            raise UsageError(f"bulk addresses {', '.join(self.bulk)}: give either {AUTO!r} or addresses")
        if self.cache_policy:
            check_policy(self.cache_policy)
        if self.transport:
            check_transport(self.transport)
        for text in (self.pool, self.guest_addresses):
            if text:
                Pool.parse(text)
        if not 0 <= self.keep_bytes < 1 << 60 or not 0 <= self.keep_s < 1 << 40:
            raise UsageError("keep_bytes and keep_s are bytes and seconds, 0 or more")
        if self.cpu_cap and not 0.1 <= self.cpu_cap <= 1:
            raise UsageError(
                "cpu_cap is the part of a core that a handoff's codec may use: 0.1 to 1, or 0 for all of it"
            )

    # -- configuration

    @staticmethod
    def load(root: Path | str | None = None) -> Site:
        """The site whose directory `root` is. UnknownThing if there is none, Corrupt if site.toml is damaged."""
        root = Path(root) if root is not None else default_root()
        root = root.absolute()
        path = root / "site.toml"
        try:
            data = tomllib.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownThing(
                f"no site at {root}: make one with 'haulier site init' or 'haulier site join', or give --root"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Corrupt(f"{path} is not valid TOML ({error}): mend it by hand") from None
        known = {"name": str, "control": str, "bulk": list, "moved_hook": str, "store_budget": int}
        known |= {"ram": str, "cache_policy": str, "keep_bytes": int, "keep_s": int, "cpu_cap": float}
        known |= {"origin": str, "origin_endpoint": str, "origin_cost": int}
        known |= {"coordinator": str, "database": str, "transport": str, "path": list, "tunnel_idle_s": int}
        known |= {"pool": str, "guest_addresses": str, "dhcp": bool}
        for key, value in data.items():
            if key not in known:
                raise Corrupt(f"{path}: unknown setting {key!r}; known are {', '.join(known)}")
            if not isinstance(value, known[key]):
                raise Corrupt(f"{path}: {key} must be of type {known[key].__name__}")
        for key in ("name", "control"):
            if key not in data:
                raise Corrupt(f"{path}: {key} is missing")
        try:
            rules = read_rules(data.pop("path", []))
            return Site(root=root, paths=rules, **{**data, "bulk": tuple(str(a) for a in data.get("bulk", ()))})
        except UsageError as error:
            raise Corrupt(f"{path}: {error}") from None

    def save(self) -> None:
        """Makes the directory and writes site.toml last, so that a half-made site is no site."""
        if (self.root / "site.toml").exists():
            raise Conflict(f"{self.root} already holds a site: give another --root, or use what is there")
        self.make_directories()
        lines = [
            f"name = {json.dumps(self.name)}",
            f"control = {json.dumps(self.control)}",
            f"bulk = {json.dumps(list(self.bulk))}",
            f"moved_hook = {json.dumps(self.moved_hook)}",
            f"store_budget = {self.store_budget}",
        ]
        lines += [f"{key} = {json.dumps(getattr(self, key))}" for key in _OPTIONAL if getattr(self, key)]
        write_atomically(self.root / "site.toml", ("\n".join(lines) + "\n").encode())

    def set(self, **changes: str | int) -> Site:
        """This site with other settings, written to site.toml; whatever else stands there stays."""
        path = self.root / "site.toml"
        kept = [line for line in path.read_text().splitlines() if line.partition("=")[0].strip() not in changes]
        # settings of the top level must stand before any table
        lines = [*(f"{key} = {json.dumps(value)}" for key, value in changes.items() if value), *kept]
        # the URL of a database may hold a password
        mode = 0o600 if changes.get("database") else path.stat().st_mode & 0o777
        write_atomically(path, ("\n".join(lines) + "\n").encode(), mode)
        return Site.load(self.root)

    def make_directories(self) -> None:
        """Creates what is missing; everything is for root's eyes only."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.tls, self.store, self.golden, self.guests, self.handoffs, self.retained, self.run):
            path.mkdir(mode=0o700, exist_ok=True)

    # -- what lies where

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def ca_certificate(self) -> Path:
        return self.tls / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """Exists only at the site that made the fleet."""
        return self.tls / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.tls / "site.pem"

    @property
    def key(self) -> Path:
        return self.tls / "site.key"

    @property
    def journal(self) -> Path:
        return self.root / "journal.sqlite"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def golden(self) -> Path:
        return self.root / "golden"

    @property
    def guests(self) -> Path:
        return self.root / "guests"

    @property
    def handoffs(self) -> Path:
        return self.root / "handoffs"

    @property
    def layers(self) -> Path:
        """Layers of containers' images, as directories."""
        return self.root / "layers"

    @property
    def retained(self) -> Path:
        return self.root / "retained"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def ram_dir(self) -> Path:
        """A tmpfs directory for the memory of guests."""
        return Path(self.ram) if self.ram else Path("/dev/shm") / f"haulier-{self.name}"

    def mirror(self, handoff: str) -> Path:
        """The mirror of a guest's memory while a handoff is under way.

        Beside the guests' memory, not on disk: the writing back of hundreds of megabytes would stand before every
        sync of the journal, and those are part of the downtime.
        """
        self.ram_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.ram_dir / f"mirror-{check_name(handoff, 'handoff')}"

    def guest_root(self, name: str) -> Path:
        """Directory of one guest; UsageError for a name that is none."""
        return self.guests / check_name(name, "guest")

    def handoff_root(self, handoff: str) -> Path:
        """Directory of one handoff; UsageError for an id that is none."""
        return self.handoffs / check_name(handoff, "handoff")

    def offer_socket(self, handoff: str) -> Path:
        """Where a handoff's worker takes over the connection on which its offer came."""
        return self.handoff_root(handoff) / "offer.sock"

    def reachable(self) -> tuple[str, ...]:
        """Where others can bring bytes to: the bulk addresses, or (auto) those of this host's uplinks as they are now.

        HaulierError if the host does not tell.
        """
        if self.bulk != (AUTO,):
            return self.bulk
        return addresses.own_addresses(addresses.uplinks()) or (self.control_host,)

    @property
    def explores(self) -> bool:
        """Paths are looked for among all uplinks, as their caps and costs, or "auto", ask for."""
        return bool(self.paths) or self.bulk == (AUTO,)

    def listening(self) -> tuple[str, ...]:
        """What to bind for `reachable`."""
        if self.bulk != (AUTO,):
            return self.bulk
        return tuple(sorted({"::" if ":" in address else "0.0.0.0" for address in self.reachable()}))

    @property
    def control_host(self) -> str:
        return split_address(self.control)[0]

    @property
    def control_port(self) -> int:
        return split_address(self.control)[1]

    def check_socket_path(self, path: Path) -> Path:
        """`path` if a unix socket can live there; UsageError if it is too long for one."""
        if len(os.fsencode(path)) >= _SOCKET_LIMIT:
            raise UsageError(f"{path} is too long for a unix socket: use a shorter --root or guest name")
        return path
