"""Two sites and a client on a shaped link, with real agents and a real guest: what demo, tests and benchmarks share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import haulier
from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.chunks.images import import_image
from haulier.chunks.store import ChunkStore
from haulier.containers.container import clear, is_container
from haulier.errors import GuestError, HaulierError
from haulier.guests.accel import probe, qemu_version
from haulier.guests.golden import Golden, list_goldens, make_golden
from haulier.handoff.residence import container_paths
from haulier.lab.image import DEFAULT_SIZE, Application, cached_image
from haulier.lab.lab import Lab
from haulier.network.relay import receive_buffers

IMAGE = "debian"
GUEST_ADDRESS = "10.77.0.10/24"
GUEST_ADDRESS6 = "fd77::10/64"
GATEWAY = "10.77.0.1/24"
GATEWAY6 = "fd77::1/64"
POOLS = {"oslo": "10.78.1.0/24", "lisbon": "10.78.2.0/24"}
POOLS6 = {"oslo": "fd78:1::/112", "lisbon": "fd78:2::/112"}
"""Guests' addresses of each site, for the policy mptcp."""
CONTROL_PORT = 7440
CACHE = Path("/var/cache/haulier")
WORK = Path("/var/lib/haulier-lab")

Say = Callable[[float, str], None]


def quiet(share: float, what: str) -> None:
    """A progress callback that says nothing."""


def topology(name: str, links: list[str], *, ipv6: bool = False) -> str:
    """Sites oslo, lisbon and client; `links` are the settings of each link between oslo and lisbon."""
    text = [f'name = "{name}"', f"ipv6 = {str(ipv6).lower()}"]
    for site in ("oslo", "lisbon"):
        text += ["[[site]]", f'name = "{site}"', f'guest_gateway = "{GATEWAY}"']
        text += [f'guest_gateway6 = "{GATEWAY6}"'] if ipv6 else []
    text += ["[[site]]", 'name = "client"']
    for number, settings in enumerate(links):
        text += ["[[link]]", f'name = "wan{number}"', 'a = "oslo"', 'b = "lisbon"', settings]
    for site in ("oslo", "lisbon"):
        text += ["[[link]]", f'name = "client-{site}"', 'a = "client"', f'b = "{site}"', 'rate = "100mbit"']
        text += ['delay = "5ms"']
    return "\n".join(text) + "\n"


def wan(rate: str, delay: str) -> str:
    """Settings of one link between the sites; `delay` is one way."""
    return f'rate = "{rate}"\ndelay = "{delay}"'


# -- the image and its golden snapshot, made once -----------------------------------------------------------------


class Filled(Protocol):
    """What sites of a scenario start from."""

    def copy_to(self, root: Path) -> None: ...


@dataclass(frozen=True)
class Template:
    """A store that holds the image and its golden snapshot; sites start as copies of it."""

    root: Path
    golden: Golden

    @property
    def store(self) -> Path:
        return self.root / "store"

    def copy_to(self, root: Path) -> None:
        """Gives a site's directory the image and the snapshot, as if they had been brought there before."""
        root.mkdir(parents=True, exist_ok=True)
        for name in ("store", "golden"):
            subprocess.run(
                ["cp", "-a", "--reflink=auto", "--sparse=always", str(self.root / name), str(root / name)], check=True
            )


def template(
    memory_mib: int, say: Say = quiet, *, application: Application | None = None, size: int = DEFAULT_SIZE
) -> Template:
    """Builds the Debian image, imports it and takes its golden snapshot; all of it is kept for the next time.

    With `application` the image has that too, and its name.
    """
    say(0.0, "building the guest image from Debian packages")
    image = cached_image(size=size, application=application)
    CACHE.mkdir(parents=True, exist_ok=True)
    what = f"{image.name} {memory_mib} {qemu_version()} {probe().kind}"
    name, kind = (application.name, f"{application.name}-site") if application else (IMAGE, "site")
    root = CACHE / f"{kind}-{hashlib.blake2b(what.encode(), digest_size=6).hexdigest()}"
    with (CACHE / ("lock" if kind == "site" else f"lock-{kind}")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = list_goldens(root / "golden") if root.exists() else []
        if found:
            return Template(root, found[0])
        for old in CACHE.glob(f"{kind}-*"):
            shutil.rmtree(old, ignore_errors=True)
        root.mkdir(parents=True)
        with ChunkStore(root / "store") as store:
            import_image(store, name, image, lambda done, total: say(0.5 + 0.1 * done / max(1, total), "importing"))
            golden = make_golden(
                store,
                name,
                memory_mib,
                root / "work",
                root=root / "golden",
                progress=lambda share, text: say(0.6 + 0.4 * share, f"golden snapshot: {text}"),
            )
        return Template(root, golden)


# -- sites with agents --------------------------------------------------------------------------------------------


@dataclass
class LabSite:
    """One site of a scenario: its directory, its agent, and a client of that agent."""

    lab: Lab
    name: str
    root: Path
    agent: subprocess.Popen[bytes] | None = None
    logs: list[IO[bytes]] = field(default_factory=list)

    @property
    def site(self) -> Site:
        return Site.load(self.root)

    @property
    def client(self) -> Client:
        return Client.local(self.site)

    def haulier(self, *words: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a haulier command at this site, as its operator would."""
        command = [sys.executable, "-m", "haulier", *words]
        environment = {**os.environ, "HAULIER_ROOT": str(self.root)}
        done = subprocess.run(
            self.lab.command(self.name, command),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            # With --json an error is an object on stdout.
            said = (done.stderr.strip() or done.stdout.strip())[-1500:]
            raise HaulierError(f"haulier {' '.join(words)} at {self.name} failed ({done.returncode}): {said}")
        return done

    def facts(self, *words: str, timeout: float = 120) -> Any:
        """The JSON that a haulier command prints."""
        # Progress comes as lines of its own; the last one is the result.
        return json.loads(self.haulier(*words, "--json", timeout=timeout).stdout.strip().splitlines()[-1])

    def start_agent(self) -> None:
        """Starts the agent and waits until it answers."""
        log = (self.root / "agent.log").open("ab")
        self.agent = self.lab.popen(
            self.name,
            [sys.executable, "-m", "haulier", "agent", "--root", str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.site()
                return
            except HaulierError as error:
                if self.agent.poll() is not None or time.monotonic() > deadline:
                    text = (self.root / "agent.log").read_text(errors="replace")[-1500:]
                    raise GuestError(f"the agent of {self.name} did not start ({error}): {text}") from error
            time.sleep(0.05)

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        """Ends the agent; what it runs goes on."""
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(number)
            self.agent.wait(20)
        self.agent = None


@dataclass
class Scenario:
    """A lab with agents at oslo and lisbon."""

    lab: Lab
    work: Path
    sites: dict[str, LabSite]
    template: Filled

    @property
    def oslo(self) -> LabSite:
        return self.sites["oslo"]

    @property
    def lisbon(self) -> LabSite:
        return self.sites["lisbon"]

    def other(self, name: str) -> LabSite:
        return self.lisbon if name == "oslo" else self.oslo

    def route(self, site: str, address: str = GUEST_ADDRESS) -> None:
        """The client reaches the guest at `site` from now on."""
        self.lab.route_guest("client", address.partition("/")[0], site)

    def give_pools(self, *, ipv6: bool = False) -> None:
        """Each site gets addresses for guests, which the client reaches there directly; it speaks MPTCP if it can."""
        address = self.lab.address6 if ipv6 else self.lab.address
        for site, pool in (POOLS6 if ipv6 else POOLS).items():
            at = self.sites[site]
            at.kill_agent()
            config = at.root / "site.toml"
            config.write_text(f"pool = {json.dumps(pool)}\n" + config.read_text())
            at.start_agent()
            via = address(site, f"client-{site}")
            way = ["ip", "route", "replace", pool, "via", via, "src", address("client")]
            self.lab.exec("client", way)
        # Linux accepts no announced address unless it is told to, and is slow on those that join late.
        self.lab.exec("client", ["ip", "mptcp", "limits", "set", "subflows", "8", "add_addr_accepted", "8"])
        now = self.lab.exec("client", ["sysctl", "-n", "net.ipv4.tcp_rmem"]).stdout
        if wanted := receive_buffers(now):
            self.lab.exec("client", ["sysctl", "-qw", f"net.ipv4.tcp_rmem={wanted}"])

    def start_guest(
        self,
        name: str = "web1",
        address: str = GUEST_ADDRESS,
        memory: str = "512M",
        image: str = IMAGE,
        address6: str = "",
    ) -> dict[str, Any]:
        """Starts a guest at oslo from the golden snapshot; what `haulier guest show` tells of it."""
        addresses = [each for each in (address, address6) if each]
        words = ["guest", "run", name, "--image", image, "--memory", memory]
        facts = self.oslo.facts(*words, *(word for each in addresses for word in ("--address", each)), timeout=300)
        for each in addresses:
            self.route("oslo", each)
        return dict(facts)

    def hand_over(self, name: str, source: str, target: str, *words: str, timeout: float = 900) -> dict[str, Any]:
        """A handoff as the operator asks for it; the report."""
        done = self.sites[source].haulier("handoff", name, "--to", target, *words, "--json", timeout=timeout)
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    def wan_bytes(self) -> int:
        """Bytes of IP packets that crossed the links between the two sites, both ways."""
        return sum(sum(self.lab.wire_bytes(link)) for link in self.lab.links_between("oslo", "lisbon"))

    def wan_packets(self) -> int:
        """IP packets that crossed them."""
        return sum(self.lab.link(link).packets() for link in self.lab.links_between("oslo", "lisbon"))


def hook_script(lab: Lab) -> str:
    """A moved_hook that leads the lab's client to the guest's new site."""
    six = lab.topology.ipv6
    cases = "\n".join(
        f"  {site}) via={lab.address(site, link)} via6={lab.address6(site, link) if six else ''} ;;"
        for site, link in (("oslo", "client-oslo"), ("lisbon", "client-lisbon"))
    )
    inside = f"nsenter --net=/run/netns/{lab.namespace('client')} -- ip route replace"
    source6 = lab.address6("client") if six else ""
    return (
        "#!/bin/sh\n"
        "# Called with GUEST ADDRESS OLD-SITE NEW-SITE. Does what a route daemon does in the field.\n"
        f'case "$4" in\n{cases}\n  *) exit 1 ;;\nesac\n'
        f'case "$2" in *:*) ;; *) {inside} "$2/32" via $via src {lab.address("client")} ;; esac || exit 1\n'
        'if [ -n "$via6" ] && [ -n "$HAULIER_ADDRESS6" ]; then\n'
        f'  {inside} "$HAULIER_ADDRESS6/128" via $via6 src {source6}\n'
        "fi\n"
    )


@contextmanager
def scenario(
    name: str, made: Filled, links: list[str], *, keep: bool = False, agents: bool = True, ipv6: bool = False
) -> Iterator[Scenario]:
    """Brings the lab up, makes the two sites a fleet, starts their agents; takes everything down at the end.

    With `ipv6` the two sites know IPv6 addresses of each other and nothing else.
    """
    work = WORK / name
    if work.exists():
        clear_killed(work)
    lab = Lab.up(topology(name, links, ipv6=ipv6), force=True)
    sites = {site: LabSite(lab, site, work / site) for site in ("oslo", "lisbon")}
    try:
        for site in sites.values():
            made.copy_to(site.root)
        hook = work / "moved-hook"
        hook.write_text(hook_script(lab))
        hook.chmod(0o755)
        if agents:
            _make_fleet(lab, sites, hook, ipv6)
        yield Scenario(lab, work, sites, made)
    finally:
        for site in sites.values():
            with contextlib.suppress(Exception):
                site.kill_agent(signal.SIGTERM)
        for site in sites.values():
            with contextlib.suppress(HaulierError, OSError):
                _end_containers(site.site)
        # Ends whatever still runs inside the sites: guests, exports, workers.
        lab.down()
        for site in sites.values():
            with contextlib.suppress(HaulierError):
                shutil.rmtree(site.site.ram_dir, ignore_errors=True)
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def clear_killed(work: Path) -> None:
    """What a run left behind that was killed, or whose host was restarted: mounts, too."""
    for root in work.iterdir():
        with contextlib.suppress(HaulierError):
            site = Site.load(root)
            _end_containers(site)
            shutil.rmtree(site.ram_dir, ignore_errors=True)
    shutil.rmtree(work)


def _end_containers(site: Site) -> None:
    """Their processes are in namespaces of their own, where the lab does not look."""
    for guest in site.guests.iterdir() if site.guests.is_dir() else ():
        paths = container_paths(site, guest.name)
        if is_container(paths):
            clear(paths)


def _make_fleet(lab: Lab, sites: dict[str, LabSite], hook: Path, ipv6: bool) -> None:
    def control_of(site: str) -> str:
        address = lab.address6(site, paths[0]) if ipv6 else lab.address(site, paths[0])
        return f"[{address}]:{CONTROL_PORT}" if ipv6 else f"{address}:{CONTROL_PORT}"

    paths = lab.links_between("oslo", "lisbon")
    for site in sites.values():
        control = control_of(site.name)
        address = lab.address6 if ipv6 else lab.address
        bulk = [word for link in paths for word in ("--bulk", address(site.name, link))]
        if site.name == "oslo":
            site.haulier("site", "init", "oslo", "--address", control, *bulk)
        else:
            token = sites["oslo"].facts("site", "token")["token"]
            via = control_of("oslo")
            site.haulier("site", "join", "--via", via, "--token", token, site.name, "--address", control, *bulk)
        config = site.root / "site.toml"
        text = config.read_text().replace('moved_hook = ""', f"moved_hook = {json.dumps(str(hook))}")
        # Labs of one host must not meet in a directory that is named after the site alone.
        config.write_text(text + f"ram = {json.dumps(f'/dev/shm/haulier-{lab.name}-{site.name}')}\n")
        site.start_agent()


def versions() -> dict[str, str]:
    """What figures depend on."""
    return {
        "haulier": haulier.__version__,
        "qemu": ".".join(map(str, qemu_version())),
        "python": sys.version.split()[0],
        "kernel": os.uname().release,
    }
