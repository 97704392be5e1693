"""A lab as a whole: up, down, commands in its sites, routes to its guests.

    lab = Lab.up(Path("demo.toml"))
    lab.exec("oslo", ["ping", "-c1", lab.address("lisbon")])
    lab.link("oslo-lisbon").set(rate_bps=5e6)
    lab.route_guest("client", "10.77.0.10", "lisbon")
    lab.down()

All state lies in the kernel and in one file, so every process may open the same lab with `Lab.load(name)`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from haulier.errors import Conflict, Corrupt, HaulierError, UnknownThing, Unsupported, UsageError
from haulier.lab import namespaces, netem, processes, state, tun
from haulier.lab import topology as topologies
from haulier.lab.link import Link
from haulier.lab.relay import Config
from haulier.lab.topology import BRIDGE, GATEWAY_MAC, LinkSpec, Topology

BACKENDS = ("netem", "tun")
_GRACE_S = 3.0
"""What processes inside a site get between SIGTERM and SIGKILL when the lab goes down."""
_TUN_QUEUE = 10_000
"""Packets between the kernel and the relay: room for a sender's burst, so that only the link's own queue drops."""
T = TypeVar("T")


class Lab:
    """A lab that is up."""

    def __init__(self, found: state.LabState) -> None:
        self._state = found
        self.topology = topologies.load(found.topology)

    # -- up and down ---------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, source: Topology | str | Path, *, force: bool = False, backend: str | None = None) -> Lab:
        """Brings a lab up: a `Path` is a TOML file, a `str` the TOML text.

        `Conflict` when it is up already (`force` takes it down first). `backend`: "netem" or "tun"; None = netem
        where the kernel has it. Whatever fails, nothing is left behind.
        """
        if isinstance(source, Topology):
            raise UsageError("give the topology's TOML text or file, so that it can be kept with the lab")
        text = _read(source) if isinstance(source, Path) else source
        plan = topologies.load(text)
        if os.geteuid() != 0:
            raise UsageError(f"lab {plan.name}: network namespaces need root: run this as root")
        if backend is None:
            backend = "netem" if netem.available() else "tun"
        if backend not in BACKENDS:
            raise UsageError(f"back end {backend!r}: there are {' and '.join(BACKENDS)}")
        if backend == "netem" and not netem.available():
            raise Unsupported("this kernel has no netem: leave the back end out, or take tun")
        with state.lock(plan.name):
            if state.path(plan.name).exists():
                if not force:
                    raise Conflict(
                        f"lab {plan.name} is up already: take it down with `haulier lab down {plan.name}`, "
                        "or bring it up anew with --force"
                    )
                _down(plan.name)
            fresh = _plan_state(plan, text, backend)
            try:
                _make_namespaces(fresh, force, plan.ipv6)
                _make_links(plan, fresh)
                _configure(plan, fresh)
                fresh.complete = True
                state.save(fresh)
            except _Taken as error:
                state.remove_lock(plan.name)
                raise Conflict(str(error)) from None
            except BaseException:
                _down(plan.name)
                state.remove_lock(plan.name)
                raise
        return cls(fresh)

    @classmethod
    def load(cls, name: str) -> Lab:
        """Opens a lab that is up; `UnknownThing` when it is not."""
        found = state.load(name)
        if not found.complete:
            raise Conflict(f"lab {name} was left half way up: `haulier lab down {name}`, then bring it up again")
        return cls(found)

    @staticmethod
    def names() -> list[str]:
        """Labs that are up (or were left half way)."""
        return state.names()

    def down(self) -> None:
        """Takes the lab down: its processes, namespaces, links and files."""
        take_down(self.name)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The lab's name."""
        return self._state.lab

    @property
    def backend(self) -> str:
        """ "netem" or "tun": results should name it."""
        return self._state.backend

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self._state.sites)

    @property
    def links(self) -> list[str]:
        """Names of the links."""
        return list(self._state.links)

    def namespace(self, site: str) -> str:
        """The network namespace of a site."""
        return self._site(site).namespace

    def address(self, site: str, link: str | None = None) -> str:
        """A site's address on a link; without a link its own, which is reached over whatever link leads there."""
        found = self._site(site)
        if link is None:
            return found.address
        if link not in found.links:
            there = ", ".join(found.links) or "none"
            raise UsageError(f"site {site} has no end of link {link!r}: it has {there}")
        return found.links[link]

    def address6(self, site: str, link: str | None = None) -> str:
        """The same for IPv6; `UsageError` in a lab that was brought up without it."""
        self.address(site, link)
        found = self.topology.site(site).address6
        if link is not None:
            there = self.topology.link(link).address6(site)
            found = there.ip if there else None
        if found is None:
            raise UsageError(f"lab {self.name} has no IPv6: write ipv6 = true at the top of its topology")
        return str(found)

    def link(self, name: str) -> Link:
        """A link, to look at or change."""
        return Link(self.name, name)

    def links_between(self, a: str, b: str) -> list[str]:
        """Names of the links between two sites, in order of the topology."""
        self._site(a), self._site(b)
        return [name for name, link in self._state.links.items() if {link.a, link.b} == {a, b}]

    def wire_bytes(self, link: str) -> tuple[int, int]:
        """Bytes of IP packets that crossed a link since `up`: (a to b, b to a)."""
        return self.link(link).wire_bytes()

    def status(self) -> dict[str, Any]:
        """Everything `haulier lab status` tells, as JSON values."""
        now = state.load(self.name)
        links: dict[str, Any] = {}
        for name, found in now.links.items():
            link = self.link(name)
            running = link.alive()
            entry = msgspec.to_builtins(found)
            entry["alive"] = running
            entry["wire_bytes"] = list(link.wire_bytes()) if running else None
            stats = link.stats() if running else None
            entry["packets"] = msgspec.to_builtins(stats) if stats else None
            links[name] = entry
        return {
            "lab": self.name,
            "backend": self.backend,
            "sites": msgspec.to_builtins(now.sites),
            "links": links,
        }

    # -- use -----------------------------------------------------------------------------------------------------

    def command(self, site: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in a site."""
        return namespaces.inside(self.namespace(site), argv)

    def exec(
        self, site: str, argv: Sequence[str], *, given: str | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a site to its end, output captured. `HaulierError` when it fails (unless not `check`)."""
        try:
            done = subprocess.run(
                self.command(site, argv), input=given, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise HaulierError(f"{' '.join(argv)} in site {site} did not end within {timeout:g} s") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise HaulierError(f"{' '.join(argv)} in site {site} failed ({done.returncode}): {said}")
        return done

    def popen(self, site: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command in a site; `options` as for `subprocess.Popen`. The id is the command's own."""
        return subprocess.Popen(self.command(site, argv), **options)

    def call(self, site: str, function: Callable[[], T]) -> T:
        """Calls a function inside a site: sockets that it makes belong there."""
        return namespaces.call(self.namespace(site), function)

    def route_guest(self, client_site: str, guest_ip: str, via_site: str) -> None:
        """Makes `client_site` reach a guest's address through `via_site`.

        Sites on the way there get the same route; `via_site` itself delivers to its own bridge. The client's
        packets carry its own address (`address(client_site)`), so a connection outlives the change.
        """
        self._site(client_site)
        if not self._site(via_site).guest_gateway:
            raise UsageError(f"site {via_site} has no guest_gateway, so no guest can be behind it")
        try:
            guest = ip_address(guest_ip.partition("/")[0])
        except ValueError as error:
            raise UsageError(f"guest address {guest_ip!r}: {error}") from None
        # First where the path ends, last at the client, so that no packet meets a loop on the way.
        family, address = ("-4", self.address) if guest.version == 4 else ("-6", self.address6)
        whole = f"{guest}/{guest.max_prefixlen}"
        flush = ["ip", family, "route", "flush", "exact", whole]
        namespaces.run(namespaces.inside(self.namespace(via_site), flush))
        if client_site == via_site:
            return
        here = client_site
        hops: list[tuple[str, LinkSpec]] = []
        for link in self.topology.path(client_site, via_site):
            hops.append((here, link))
            here = link.other(here)
        for site, link in reversed(hops):
            via = address(link.other(site), link.name)
            line = f"route replace {whole} via {via} dev {link.interface}"
            if site == client_site:
                line += f" src {address(site)}"
            namespaces.ip(self.namespace(site), [line])

    def _site(self, name: str) -> state.SiteState:
        self.topology.site(name)
        return self._state.sites[name]


def take_down(name: str) -> None:
    """Removes everything of a lab, whatever is left of it; fine when there is nothing.

    Processes that run inside its sites are ended first (SIGTERM, 3 s later SIGKILL).
    """
    with state.lock(name):
        _down(name)
        state.remove_lock(name)


class _Taken(Conflict):
    """A namespace of that name is there already. Nothing was made yet, so nothing is to be removed."""


def _read(source: Path) -> str:
    topologies.load(source)
    return source.read_text()


def _plan_state(plan: Topology, text: str, backend: str) -> state.LabState:
    folder = state.directory(plan.name)
    sites = {
        site.name: state.SiteState(
            namespace=f"{plan.name}-{site.name}",
            address=str(site.address),
            guest_gateway=str(site.guest_gateway or ""),
            links={link.name: str(link.address(site.name).ip) for link in plan.links_of(site.name)},
        )
        for site in plan.sites
    }
    links = {
        link.name: state.LinkState(
            a=link.a,
            b=link.b,
            interface=link.interface,
            subnet=str(link.subnet),
            mtu=link.mtu,
            a_to_b=link.a_to_b,
            b_to_a=link.b_to_a,
            # By the interface, not the name: a socket's path has to stay under 108 bytes.
            socket=str(folder / f"{link.interface}.sock") if backend == "tun" else "",
        )
        for link in plan.links
    }
    return state.LabState(
        version=state.VERSION,
        lab=plan.name,
        instance=secrets.token_hex(8),
        backend=backend,
        complete=False,
        topology=text,
        sites=sites,
        links=links,
    )


def _make_namespaces(fresh: state.LabState, force: bool, ipv6: bool) -> None:
    # One lab at a time from here: lab "a" with site "b-c" and lab "a-b" with site "c" want the same name.
    with state.lock_names():
        for site in fresh.sites.values():
            if namespaces.exists(site.namespace):
                if not force or site.namespace in _others(fresh.lab):
                    raise _Taken(
                        f"network namespace {site.namespace} exists already: remove it with "
                        f"`ip netns delete {site.namespace}`, or give the lab another name"
                    )
                _remove_namespaces([site.namespace])
        # The file comes first: from here on `down` knows what to look for.
        state.directory(fresh.lab).mkdir(parents=True, exist_ok=True)
        state.save(fresh)
        for site in fresh.sites.values():
            namespaces.add(site.namespace, ipv6=ipv6)


def _others(lab: str) -> set[str]:
    """Namespaces that belong to other labs."""
    found: set[str] = set()
    for name in state.names():
        if name != lab:
            try:
                found.update(site.namespace for site in state.load(name).sites.values())
            except (Corrupt, UnknownThing):
                continue
    return found


def _make_links(plan: Topology, fresh: state.LabState) -> None:
    folder = state.directory(fresh.lab)
    for number, link in enumerate(plan.links):
        entry = fresh.links[link.name]
        ends = fresh.sites[link.a].namespace, fresh.sites[link.b].namespace
        if fresh.backend == "netem":
            netem.create(*ends, link.interface, link.mtu)
            netem.apply(ends[0], link.interface, link.a_to_b, link.mtu)
            netem.apply(ends[1], link.interface, link.b_to_a, link.mtu)
            continue
        config = Config(
            a=ends[0],
            b=ends[1],
            interface=link.interface,
            mtu=link.mtu,
            socket=entry.socket,
            log=str(folder / f"{link.interface}.log"),
            seed=number,
            a_to_b=link.a_to_b,
            b_to_a=link.b_to_a,
        )
        started = tun.launch(fresh.lab, link.name, fresh.instance, config)
        entry.pid, entry.started = started.pid, started.started
        state.save(fresh)


def _configure(plan: Topology, fresh: state.LabState) -> None:
    """Addresses, bridge and routes of every site: one batch each."""
    for site in plan.sites:
        lines = [f"addr add {site.address}/32 dev lo"]
        if site.address6 is not None:
            lines.append(f"addr add {site.address6}/128 dev lo nodad")
        for link in plan.links_of(site.name):
            if fresh.backend == "tun":
                lines.append(f"link set {link.interface} mtu {link.mtu} txqueuelen {_TUN_QUEUE}")
            lines.append(f"addr add {link.address(site.name)} dev {link.interface}")
            if (address6 := link.address6(site.name)) is not None:
                lines.append(f"addr add {address6} dev {link.interface} nodad")
            lines.append(f"link set {link.interface} up")
        if site.guest_gateway is not None:
            # A MAC given by hand stays; otherwise a bridge takes over the lowest one of its ports.
            lines.append(f"link add {BRIDGE} address {GATEWAY_MAC} type bridge stp_state 0 forward_delay 0")
            lines.append(f"addr add {site.guest_gateway} dev {BRIDGE}")
            if site.guest_gateway6 is not None:
                lines.append(f"addr add {site.guest_gateway6} dev {BRIDGE} nodad")
            lines.append(f"link set {BRIDGE} up")
        for route in plan.routes(site.name):
            line = f"route add {route.to} via {route.via} dev {route.interface}"
            lines.append(line + (f" src {route.source}" if route.source else ""))
        namespaces.ip(fresh.sites[site.name].namespace, lines)


def _down(name: str) -> None:
    _remove_namespaces(state.namespaces_of(name))
    # The process table rather than the state file: it also has relays that were just being launched, and when one of
    # those was about to fork, the next look finds its child.
    while relays := tun.find(name):
        left = processes.end(relays, _GRACE_S)
        if left:
            raise HaulierError(f"relays {left} of lab {name} do not end: see why, then `haulier lab down {name}` again")
    state.remove(name)


def _inside(names: Sequence[str]) -> set[tuple[int, int]]:
    """(id, start time) of every process that lives in the namespaces, but this one and those above it."""
    spare = processes.ancestors()
    found: set[tuple[int, int]] = set()
    for namespace in names:
        for pid in namespaces.processes(namespace):
            start = processes.started(pid)
            if pid not in spare and start is not None:
                found.add((pid, start))
    return found


def _remove_namespaces(names: Sequence[str]) -> None:
    """Ends what runs inside, then removes them."""
    # Again until none is found: what is being ended may start something else.
    for _ in range(5):
        inside = _inside(names)
        if not inside:
            break
        processes.end(inside, _GRACE_S)
    for namespace in names:
        namespaces.delete(namespace)
