"""Where the documents' commands run: bare hosts at two sites, and one's own machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError, UnknownThing
from haulier.lab.image import cached_image
from haulier.lab.lab import Lab
from haulier.lab.scenario import IMAGE, WORK, Template
from tests.docs.pages import ROOT, Step, fill_in, missing_lines
from tests.support.waiting import wait_for

TOPOLOGY = """
name = "{name}"
[[site]]
name = "oslo"
address = "192.0.2.10"
{bridge}
[[site]]
name = "lisbon"
address = "203.0.113.20"
{bridge}
[[link]]
name = "wan0"
a = "oslo"
b = "lisbon"
rate = "100mbit"
delay = "5ms"
[[link]]
name = "wan1"
a = "oslo"
b = "lisbon"
rate = "100mbit"
delay = "8ms"
subnet = "198.51.100.20/30"
"""
UNIT = ROOT / "packaging" / "haulier-agent.service"
STEP_S = 180.0


@dataclass
class Host:
    """A site's machine: its network, its directory (what `/var/lib/haulier` is in the field), and its agent."""

    name: str
    lab: Lab
    root: Path
    agent: subprocess.Popen[bytes] | None = None

    def settle(self) -> None:
        """Two sites of one machine must not meet in /dev/shm, nor those of two runs."""
        config = self.root / "site.toml"
        if config.exists() and "\nram = " not in config.read_text():
            with config.open("a") as file:
                file.write(f'ram = "/dev/shm/haulier-{self.lab.name}-{self.name}"\n')


@dataclass
class DocsStage:
    """Runs the steps of pages, one after the other; raises AssertionError for what a page says and is not so."""

    hosts: Mapping[str, Host]
    work: Path
    environment: dict[str, str]
    known: dict[str, str] = field(default_factory=dict)
    took: list[tuple[float, Step]] = field(default_factory=list)

    def run(self, step: Step) -> str:
        """What it printed. A step whose shown output begins with `haulier:` has to fail, any other to succeed."""
        begun = time.monotonic()
        try:
            text = fill_in(step.command, self.known)
        except ValueError as error:
            raise AssertionError(f"{step.where}: {error}") from None
        if text.startswith("systemctl enable --now "):
            self._start_agent(self.hosts[step.site])
            return ""
        if text == "systemctl restart haulier-agent":
            agent = self.hosts[step.site].agent
            assert agent is not None, step.where
            agent.terminate()
            agent.wait(30)
            self._start_agent(self.hosts[step.site])
            return ""
        command = ["bash", "-c", text]
        environment = self.environment
        if step.site:
            host = self.hosts[step.site]
            host.settle()
            command = host.lab.command(host.name, command)
            environment = {**environment, "HAULIER_ROOT": str(host.root)}
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        self.took.append((time.monotonic() - begun, step))
        fails = bool(step.shown) and step.shown[0].startswith("haulier: ")
        assert (done.returncode != 0) is fails, f"{step.where}: {text}: exit code {done.returncode}: {done.stdout}"
        lost = missing_lines(step.shown, done.stdout, self.known)
        assert not lost, f"{step.where}: {text}\nis shown to print {lost}, and printed\n{done.stdout}"
        return done.stdout

    def _start_agent(self, host: Host) -> None:
        """What systemd does with the unit: its command, with the directory of this site instead of the unit's."""
        host.settle()
        (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
        with (host.root / "agent.err").open("ab") as log:
            host.agent = host.lab.popen(
                host.name,
                shlex.split(line.removeprefix("ExecStart=")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment, "HAULIER_ROOT": str(host.root)},
            )

        def answers() -> bool:
            with contextlib.suppress(HaulierError):
                return bool(Client.local(Site.load(host.root)).site())
            assert host.agent is not None and host.agent.poll() is None, (host.root / "agent.err").read_text()
            return False

        wait_for(answers, 30, f"the agent of {host.name}")

    def slowest(self) -> str:
        return "\n".join(f"{took:5.1f} s  {step.where} {step.command}" for took, step in sorted(self.took)[-6:][::-1])


def environment() -> dict[str, str]:
    """This checkout's haulier comes first in PATH and is the one that runs."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "200",
        "LC_ALL": "C.UTF-8",
    }


@contextlib.contextmanager
def fleet(name: str, made: Template, *, bridge: bool, seeded: bool) -> Iterator[DocsStage]:
    """Two machines without haulier's directories; with `bridge`, the guests' bridge is there already.

    The chunks of the image and its golden snapshot lie where an import would put them, so that importing the same file
    again is quick; `image/debian` itself is not there. At lisbon only if `seeded`.
    """
    work = WORK / name
    shutil.rmtree(work, ignore_errors=True)
    gateway = 'guest_gateway = "10.77.0.1/24"' if bridge else ""
    lab = Lab.up(TOPOLOGY.format(name=name, bridge=gateway), force=True)
    hosts = {site: Host(site, lab, work / site) for site in ("oslo", "lisbon")}
    try:
        for host in hosts.values():
            if host.name == "lisbon" and not seeded:
                continue
            made.copy_to(host.root)
            with ChunkStore(host.root / "store") as store, contextlib.suppress(UnknownThing):
                store.drop_manifest(f"image/{IMAGE}")
        place = work / "home"
        place.mkdir()
        subprocess.run(
            ["qemu-img", "convert", "-O", "qcow2", str(cached_image()), str(place / "debian.qcow2")], check=True
        )
        yield DocsStage(hosts, place, environment())
    finally:
        for host in hosts.values():
            if host.agent is not None and host.agent.poll() is None:
                host.agent.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    host.agent.wait(20)
        lab.down()
        for host in hosts.values():
            shutil.rmtree(f"/dev/shm/haulier-{lab.name}-{host.name}", ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


def machine(work: Path, **more: str) -> DocsStage:
    """One's own machine, in the directory `work`."""
    return DocsStage({}, work, environment() | more)
