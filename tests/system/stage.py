"""A stage for whole handoffs: two sites with agents, real guests, and questions about what is where."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError
from haulier.guests.qemu import Qemu
from haulier.guests.tap import tap_name
from haulier.handoff.residence import guest_paths
from haulier.lab.clients import Answers, Workload
from haulier.lab.image import ROOT_OFFSET
from haulier.lab.scenario import GUEST_ADDRESS, LabSite, Scenario, Template, scenario, wan
from tests.support.waiting import until_none, wait_for

WORK: dict[str, Any] = {"pages_per_s": 150, "hot_pages": 400, "files_per_s": 0.5, "file_kib": 64}
"""What the guests do meanwhile: about 600 kB of memory and 32 kB of files a second."""
MEMORY_MIB = 24
"""The guest's working set: small enough to be checked in seconds under emulation."""


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@dataclass
class Handoff:
    """One handoff, begun by the command line of its source."""

    stage: Stage
    guest: str
    source: str
    target: str
    id: str
    command: subprocess.Popen[str]

    def directory(self, site: str) -> Path:
        return self.stage.site(site).root / "handoffs" / self.id

    def status(self, site: str) -> dict[str, Any]:
        """status.json of one side; {} before there is one."""
        try:
            return dict(json.loads((self.directory(site) / "status.json").read_bytes()))
        except (OSError, ValueError):
            return {}

    def wait_phase(self, site: str, phases: Collection[str], deadline_s: float = 180) -> str:
        """Waits until that side is in one of `phases`; fails when the handoff ends before."""
        end = time.monotonic() + deadline_s
        while True:
            phase = str(self.status(site).get("phase", ""))
            if phase in phases:
                return phase
            assert self.command.poll() is None, f"over before {phases}: {self.command.communicate()}"
            assert time.monotonic() < end, f"{site} stays in phase {phase!r}, waiting for {phases}"
            time.sleep(0.002)

    def wait_state(self, site: str, states: Collection[str], deadline_s: float = 120) -> str:
        """Waits until the site's journal has the guest in one of `states`."""
        end = time.monotonic() + deadline_s
        with self.stage.journal(site) as journal:
            while True:
                row = journal.find_guest(self.guest)
                if row is not None and row.handoff == self.id and row.state in states:
                    return str(row.state)
                assert self.command.poll() is None, f"over before {states}: {self.command.communicate()}"
                assert time.monotonic() < end, f"{site} stays {row and row.state}, waiting for {states}"
                time.sleep(0.002)

    def wait_sent(self, megabytes: float, deadline_s: float = 180) -> None:
        """Waits until so much memory and disk has gone over the wire."""
        wait_for(
            lambda: self.status(self.source).get("wire_bytes", 0) > megabytes * 1e6 or self.command.poll() is not None,
            deadline_s,
        )
        assert self.command.poll() is None, f"over too soon: {self.command.communicate()}"

    def worker(self, site: str) -> int:
        """Process id of that side's worker."""
        return int(self.row(site)["pid"])

    def row(self, site: str) -> dict[str, Any]:
        """The site's record of it."""
        with self.stage.journal(site) as journal:
            row = journal.handoff(self.id)
        return {name: getattr(row, name) for name in row.__struct_fields__}

    def kill_worker(self, site: str) -> None:
        """SIGKILL, as a crash or the kernel would."""
        pid = self.worker(site)
        if pid and alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not alive(pid), 10)

    def cancel(self) -> None:
        """As Ctrl-C at the command."""
        self.command.send_signal(signal.SIGINT)

    def result(self, timeout: float = 400) -> tuple[int, dict[str, Any], str]:
        """Exit code of the command, the result that it printed, what it said on stderr."""
        out, err = self.command.communicate(timeout=timeout)
        lines = [json.loads(line) for line in out.splitlines()]
        results = [line for line in lines if line.get("event") == "result"]
        return self.command.returncode, results[-1] if results else {}, err

    def done(self, timeout: float = 400) -> dict[str, Any]:
        """The report of a handoff that has to succeed."""
        code, result, err = self.result(timeout)
        assert code == 0, f"exit code {code}: {err}\n{self.logs()}"
        return dict(result["report"])

    def settled(self, deadline_s: float = 120) -> dict[str, str]:
        """Waits until both sites call it over; outcome by site."""

        def ended() -> dict[str, str]:
            found = {}
            for site in (self.source, self.target):
                try:
                    row = self.row(site)
                except HaulierError:
                    found[site] = "unknown"
                    continue
                if row["state"] != "ended":
                    return {}
                found[site] = str(row["outcome"])
            return found

        try:
            return wait_for(ended, deadline_s, f"the end of {self.id} at both sites")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        """The ends of both workers' logs, for messages."""
        text = ""
        for site in (self.source, self.target):
            for path in (self.directory(site) / "worker.log", self.stage.site(site).root / "agent.log"):
                with contextlib.suppress(OSError):
                    text += f"--- {site} {path.name}\n{path.read_text(errors='replace')[-2000:]}\n"
        return text


@dataclass
class Stage:
    """A scenario with what the tests ask of it."""

    scenario: Scenario
    answers: dict[str, Answers] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    def site(self, name: str) -> LabSite:
        return self.scenario.sites[name]

    @contextlib.contextmanager
    def journal(self, site: str) -> Iterator[Any]:
        from haulier.handoff.journal import Journal

        with Journal(self.site(site).site.journal) as journal:
            yield journal

    # -- guests ----------------------------------------------------------------------------------------------------

    def run_guest(self, name: str = "web1", address: str = GUEST_ADDRESS, *, address6: str = "", **work: Any) -> None:
        """Starts a guest at oslo, its workload, and a client that asks it all the time."""
        self.scenario.start_guest(name, address, address6=address6)
        self.addresses[name] = address
        self.work(name, **work)
        answers = Answers(self.scenario.lab, "client", address, self.scenario.work / f"answers-{name}.jsonl")
        answers.start()
        self.answers[name] = answers

    def work(self, name: str, **work: Any) -> None:
        """The guest's workload starts over; returns when there is something to check."""
        workload = self.workload(name)
        self.memory_mib = int(work.pop("memory_mib", MEMORY_MIB))
        workload.start(self.memory_mib, **(WORK | work))
        wait_for(lambda: workload.stats()["files_written"] > 0, 180, "a file of the workload")

    def workload(self, name: str) -> Workload:
        return Workload(self.scenario.lab, "client", self.addresses[name])

    def assert_right(self, name: str = "web1") -> dict[str, Any]:
        """The guest answers, its memory and files are right, and no client ever got a wrong answer."""
        since = time.time()
        assert self.answers[name].first_after(since) is not None, f"{name} does not answer"
        found = self.workload(name).examine()
        assert found["good"] and not found["bad_pages"] and not found["bad_files"], found
        assert found["pages"] == self.memory_mib * 256 and found["files"] > 0, found
        summary = self.answers[name].summary()
        assert summary["wrong"] == 0, summary
        return found

    def home(self, name: str = "web1") -> str:
        """The one site that owns and runs the guest; fails if it is not exactly one."""
        wait_for(lambda: len(self.owners(name)) == 1, 60, f"one owner of {name}: {self.owners(name)}")
        (owner,) = self.owners(name)
        other = self.scenario.other(owner).name
        facts = self.site(owner).client.guest(name)
        assert facts["status"] == "running" and alive(facts["pid"]), facts
        assert self.qemus(other, name) == [], f"a QEMU of {name} at {other}, which does not own it"
        return owner

    def owners(self, name: str) -> list[str]:
        found = []
        for site in ("oslo", "lisbon"):
            with self.journal(site) as journal:
                row = journal.find_guest(name)
            if row is not None and row.state == "owner":
                found.append(site)
        return found

    # -- handoffs --------------------------------------------------------------------------------------------------

    def begin(self, name: str = "web1", *options: str, source: str = "", target: str = "") -> Handoff:
        """Starts `haulier handoff`; returns as soon as the handoff has a number."""
        source = source or self.home(name)
        target = target or self.scenario.other(source).name
        site = self.site(source)
        known = {path.name for path in (site.root / "handoffs").iterdir()}
        command = subprocess.Popen(
            self.scenario.lab.command(
                source, [sys.executable, "-m", "haulier", "handoff", name, "--to", target, "--json", *options]
            ),
            env={**os.environ, "HAULIER_ROOT": str(site.root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def number() -> str:
            assert command.poll() is None, f"the command ended at once: {command.communicate()}"
            fresh = [path.name for path in (site.root / "handoffs").iterdir() if path.name not in known]
            return fresh[0] if fresh else ""

        return Handoff(self, name, source, target, wait_for(number, 60, "a handoff"), command)

    # -- what is where ---------------------------------------------------------------------------------------------

    def processes(self, site: str) -> list[psutil.Process]:
        """All processes that work on the site's directory, but its agent and commands."""
        root = str(self.site(site).root) + "/"
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if any(root in word or word == root[:-1] for word in words) and "agent" not in words:
                    found.append(process)
                elif "haulier.disks.export" in words and any(
                    file.path.startswith(root) for file in process.open_files()
                ):
                    # One that had waited was told what to export: its command line does not say it.
                    found.append(process)
        return found

    def qemus(self, site: str, name: str) -> list[int]:
        return [
            p.pid
            for p in self.processes(site)
            if "qemu-system" in p.cmdline()[0] and any(f"guest={name}," in word for word in p.cmdline())
        ]

    def leftovers(self, site: str, name: str, handoff: str) -> list[str]:
        """What there is at `site` of a guest that is not there, and of a handoff that is over."""
        return self.of_guest(site, name) + self.of_handoff(site, handoff)

    def of_guest(self, site: str, name: str) -> list[str]:
        here = self.site(site)
        paths = guest_paths(here.site, name)
        found = [" ".join(p.cmdline())[:150] for p in self.processes(site) if str(paths.root) in " ".join(p.cmdline())]
        if paths.root.exists():
            found += [str(path) for path in paths.root.iterdir()] or [str(paths.root)]
        if paths.ram.exists():
            found.append(str(paths.ram))
        links = self.scenario.lab.exec(site, ["ip", "-o", "link", "show"]).stdout
        if f"{tap_name(name)}:" in links:
            found.append(f"tap {tap_name(name)}")
        return found

    def of_handoff(self, site: str, handoff: str) -> list[str]:
        here = self.site(site)
        found = [" ".join(p.cmdline()) for p in self.processes(site) if handoff in p.cmdline()]
        with ChunkStore(here.site.store) as store:
            found += [f"manifest {name}" for name in store.manifest_names("incoming/")]
            found += [f"lease {name}" for name in store.leases()]
        found += [str(path) for path in here.site.ram_dir.glob("*") if handoff in path.name]
        directory = here.root / "handoffs" / handoff
        known = {"job.json", "status.json", "report.json", "worker.log"}
        if directory.exists():
            found += [str(path) for path in directory.iterdir() if path.name not in known]
        return found

    def assert_clean(self, handoff: Handoff, home: str) -> None:
        """The guest is at `home`; nothing but that is left of the handoff at either site."""
        other = self.scenario.other(home).name

        def left() -> list[str]:
            return self.of_handoff(home, handoff.id) + self.leftovers(other, handoff.guest, handoff.id)

        # A disk that everybody writes to may take half a minute for a report that has to be durable.
        found = until_none(left, 120)
        assert found == [], f"{found}\n{handoff.logs()}"
        kinds = sorted("qemu" if "qemu-system" in p.cmdline()[0] else "other" for p in self.processes(home))
        # One QEMU and one export for each guest that lives there.
        assert kinds.count("qemu") == kinds.count("other") == len(self.at(home)), kinds
        assert sorted(path.name for path in self.site(home).site.ram_dir.iterdir()) == sorted(
            guest_paths(self.site(home).site, name).ram.name for name in self.at(home)
        )

    def at(self, site: str) -> list[str]:
        return [name for name in self.addresses if site in self.owners(name)]

    # -- the link --------------------------------------------------------------------------------------------------

    def links(self) -> list[str]:
        return list(self.scenario.lab.links_between("oslo", "lisbon"))

    def set_link(self, **settings: Any) -> None:
        for link in self.links():
            self.scenario.lab.link(link).set(**settings)

    @contextlib.contextmanager
    def cut(self, *links: str) -> Iterator[None]:
        """Those links (all of them) carry nothing meanwhile."""
        names = links or tuple(self.links())
        for link in names:
            self.scenario.lab.link(link).set(up=False)
        try:
            yield
        finally:
            for link in names:
                self.scenario.lab.link(link).set(up=True)


@contextlib.contextmanager
def stage(made: Template, name: str, links: list[str] | None = None, *, ipv6: bool = False) -> Iterator[Stage]:
    """Everything up; at the end everything down again."""
    with scenario(f"sys-{name}", made, links or [wan("50mbit", "25ms")], ipv6=ipv6) as found:
        standing = Stage(found)
        try:
            yield standing
        finally:
            for answers in standing.answers.values():
                with contextlib.suppress(Exception):
                    answers.stop()


def sh(site: LabSite, guest: str, command: str, timeout: float = 60) -> str:
    """A command inside a guest."""
    qemu = Qemu.adopt(guest_paths(site.site, guest))
    try:
        with qemu.guest_agent(timeout) as agent:
            return agent.check(["/bin/sh", "-c", command], timeout=timeout).decode().strip()
    finally:
        qemu.close()


def check_file_system(site: LabSite, name: str, work: Path) -> str:
    """e2fsck of a stopped guest's disk; what it said. Fails when it is not clean."""
    from haulier.disks.export import DiskExport

    paths = guest_paths(site.site, name)
    row = None
    from haulier.handoff.journal import Journal

    with Journal(site.site.journal) as journal:
        row = journal.guest(name)
    socket, control = work / "fsck.sock", work / "fsck.ctl"
    export = DiskExport.start(site.site.store, row.manifest, socket, control, work / "fsck.log")
    raw = work / "fsck.raw"
    whole = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(paths.overlay)},
        "backing": {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "export": "disk0"},
    }
    try:
        subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(whole), str(raw)], check=True)
        done = subprocess.run(
            ["e2fsck", "-fn", f"{raw}?offset={ROOT_OFFSET}"], capture_output=True, text=True, check=False
        )
    finally:
        export.stop()
        raw.unlink(missing_ok=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


Condition = Callable[[], Any]
