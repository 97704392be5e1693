"""Containers that LXC runs: taken over from LXC's own tools while they run, and restored by them at the next site.

Dumped like any other, over CRIU's own protocol, with the options that LXC's restore expects. At a target LXC restores
them from a directory of their own, `lxc/NAME` below the guest's, so that `lxc-info -P` and its sisters know them there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from haulier.containers import bundle, network, restoring
from haulier.containers.container import Container, ContainerPaths, clear_runtime, mount, write_record
from haulier.containers.criu import find_criu, last_error
from haulier.containers.dumping import Dumping, DumpRequest
from haulier.containers.freezer import freezer_of
from haulier.containers.model import LXC_KEYS
from haulier.containers.restoring import Restoring
from haulier.durable import sync
from haulier.errors import Conflict, GuestError, UnknownThing, Unsupported
from haulier.guests.model import GuestSpec
from haulier.guests.tap import BRIDGE, tap_name
from haulier.process import ProcessId

DEFAULT_PATH: Final = Path("/var/lib/lxc")
STEP_S: Final = 60.0
_NETNS_FD: Final = 9
KEPT: Final = re.compile(LXC_KEYS)
_DROPPED: Final = re.compile(
    r"lxc\.(rootfs\.\w+|net\.\S+|include|group|start\.\w+|monitor\.\w+|log\.\w+|console\.\w+|hook\.(clone|version)"
    r"|apparmor\.\S+|selinux\.\S+|ephemeral|cgroup2?\.devices\.\w+|cgroup\.\w+|seccomp\.allow_nesting)"
)
"""What means nothing at another site, or is made anew there."""
_MAX_INCLUDES: Final = 20


def parse_config(path: Path, depth: int = 0) -> list[tuple[str, str]]:
    """Keys and values of a configuration, its includes put in. GuestError when it cannot be read."""
    if depth > _MAX_INCLUDES:
        raise GuestError(f"{path} is included by itself")
    found: list[tuple[str, str]] = []
    files = sorted(path.glob("*.conf")) if path.is_dir() else [path]
    try:
        lines = [line for file in files for line in file.read_text().splitlines()]
    except OSError as error:
        raise GuestError(f"the configuration {path} cannot be read: {error}") from error
    for line in lines:
        key, equals, value = line.strip().partition("=")
        if not equals or key.startswith("#"):
            continue
        key, value = key.strip(), value.strip()
        if key == "lxc.include":
            found += parse_config(Path(value), depth + 1)
        else:
            found.append((key, value))
    return found


def kept_of(settings: list[tuple[str, str]]) -> tuple[str, ...]:
    """The lines that go with a container. Unsupported for one that could not be the same elsewhere."""
    found = []
    for key, value in settings:
        if KEPT.fullmatch(key):
            found.append(f"{key} = {value}")
        elif value and not _DROPPED.fullmatch(key):
            raise Unsupported(f"its configuration has {key}, which cannot be the same at another site: do without it")
    return tuple(found)


def installed() -> bool:
    """LXC's tools are here."""
    return shutil.which("lxc-checkpoint") is not None


def version() -> str:
    """LXC's version; "" if it is not here."""
    try:
        return _call(["lxc-start", "--version"]).strip()
    except (GuestError, Unsupported):
        return ""


def _call(words: list[str], environment: dict[str, str] | None = None) -> str:
    """What a tool of LXC says; GuestError with its words."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        raise Unsupported("LXC's tools are not on this host: run scripts/setup, or install Debian's lxc") from None
    except subprocess.TimeoutExpired:
        raise GuestError(f"{words[0]} did not end within {STEP_S:g} s") from None
    if done.returncode:
        raise GuestError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


# -- taken over ----------------------------------------------------------------------------------------------------


class Found:
    """A container that runs under LXC's own tools. Raises UnknownThing, GuestError, Unsupported."""

    def __init__(self, name: str, folder: Path) -> None:
        self.config = folder / name / "config"
        if not self.config.exists():
            raise UnknownThing(f"LXC has no container {name!r} in {folder}: 'lxc-ls -P {folder}' shows those there are")
        text = _call(["lxc-info", "-P", str(folder), "-n", name, "-p", "-H"]).strip()
        if not text.isdigit():
            raise GuestError(f"LXC's container {name!r} does not run: start it with lxc-start first")
        self.pid = int(text)
        self.settings = parse_config(self.config)
        values = dict(self.settings)
        self.kept = kept_of(self.settings)
        kind, _, place = values.get("lxc.rootfs.path", "").rpartition(":")
        self.root = Path(place)
        if kind not in ("", "dir") or not self.root.is_dir():
            raise Unsupported(f"the files of {name!r} are not in a directory, but in {values.get('lxc.rootfs.path')!r}")
        networks = {key.split(".")[2] for key in values if key.startswith("lxc.net.")}
        kinds = {values.get(f"lxc.net.{number}.type", "") for number in networks}
        if len(networks) > 1 or not kinds <= {"veth", "empty"}:
            raise Unsupported(f"the networks of {name!r} are {', '.join(sorted(kinds))}: it may have one, of type veth")
        self.cable = self._cable() if "veth" in kinds else ""
        self.mac = ""
        if self.cable:
            text = _call(["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "-o", "link", "show", "dev", "eth0"])
            self.mac = text.partition("link/ether ")[2].split(" ", 1)[0]

    def _cable(self) -> str:
        """The host's end of its interface, which has to be on the site's bridge."""
        number = _call(["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "-o", "link", "show", "dev", "eth0"])
        peer = re.search(r"eth0@if(\d+)", number)
        for line in _call(["ip", "-o", "link", "show", "master", BRIDGE]).splitlines():
            index, name = line.split(":", 2)[:2]
            if peer is not None and index == peer[1]:
                return name.strip().partition("@")[0]
        raise Unsupported(f"its interface eth0 is not on the bridge {BRIDGE}: set lxc.net.0.link = {BRIDGE}")


def take_over(spec: GuestSpec, paths: ContainerPaths, found: Found) -> Container:
    """Makes a running container of LXC's a guest; it is not touched for that, and its files stay where they are.

    From then on LXC's tools know it while it runs, but cannot start it, at the host's next start say: another site may
    run it by then. What was done when this fails is for `let_go`. GuestError.
    """
    process = ProcessId.of(found.pid)
    if process is None:
        raise GuestError("the container ended meanwhile: start it with lxc-start first")
    name = _namespace(paths)
    record: dict[str, Any] = {"netns": name, "cable": found.cable, **asdict(process), "lxc_config": str(found.config)}
    made = LxcContainer(spec, paths, record)
    try:
        for path in (paths.bundle, paths.log_dir):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Before there is anything to be let go of.
        write_record(paths, spec, record)
        for link in (paths.rootfs, paths.upper):
            link.unlink(missing_ok=True)
            link.symlink_to(found.root)
        network.delete(name, "")
        _call(["ip", "netns", "attach", name, str(found.pid)])
        _hide(found.config, paths)
    except OSError as error:
        raise GuestError(f"LXC's container {found.config.parent.name!r} cannot be taken over: {error}") from error
    return made


def let_go(paths: ContainerPaths) -> None:
    """Takes back a take-over that did not come to its end: the container runs on, LXC's as before. May be repeated.

    GuestError when LXC cannot have its configuration back.
    """
    config = _taken_from(paths)
    if config is not None:
        hidden = _hidden(config, paths)
        try:
            if os.path.lexists(hidden) and not os.path.lexists(config):
                hidden.rename(config)
                sync(config.parent)
        except OSError as error:
            raise GuestError(f"{hidden} cannot be {config.name} again, rename it by hand: {error}") from error
    network.delete(_namespace(paths), "")
    shutil.rmtree(paths.root, ignore_errors=True)


def run_by_lxc(paths: ContainerPaths) -> bool:
    """LXC itself runs what was taken over from it: it restarted in LXC's hands, or somebody started it. GuestError."""
    config = _taken_from(paths)
    return config is not None and _active(config)


def _namespace(paths: ContainerPaths) -> str:
    return network.namespace_name(paths.root, "adopted")


def _taken_from(paths: ContainerPaths) -> Path | None:
    """Where LXC has, or had, the configuration of a container that was taken over, and that nobody has ended since."""
    try:
        found = json.loads(paths.record.read_bytes()).get("lxc_config")
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _hidden(config: Path, paths: ContainerPaths) -> Path:
    return config.with_name(f"{config.name}.taken-over-by-{paths.root.name}")


def _hide(config: Path, paths: ContainerPaths) -> None:
    """LXC has nothing to start the container by any more, also after a power cut. OSError."""
    config.rename(_hidden(config, paths))
    sync(config.parent)


def _of(config: Path) -> list[str]:
    return ["-P", str(config.parent.parent), "-n", config.parent.name]


def _active(config: Path) -> bool:
    """LXC runs that container, whether it has a configuration or not."""
    return config.parent.name in _call(["lxc-ls", "-1", "--active", "-P", str(config.parent.parent)]).split()


def _stop(config: Path) -> None:
    """Ends a container if LXC runs it. GuestError."""
    if not _active(config):
        return
    words = ["lxc-stop", "-k", *_of(config)]
    with contextlib.suppress(GuestError):
        _call(words)
    try:
        _call(["lxc-wait", *_of(config), "-s", "STOPPED", "-t", "10"])
    except GuestError as error:
        raise GuestError(f"LXC runs a container that is not its own any more, end it: {shlex.join(words)}") from error


# -- the driver ----------------------------------------------------------------------------------------------------


class LxcContainer(Container):
    """One container of LXC's. What is not said here is as for any other."""

    runner = "lxc"

    @property
    def folder(self) -> Path:
        """LXC's directory of containers for this one alone."""
        return self.paths.root / "lxc"

    @property
    def _config(self) -> Path:
        return self.folder / self.spec.name / "config"

    @classmethod
    def prepare(cls, spec: GuestSpec, paths: ContainerPaths, lower: list[Path] | None, attempt: str) -> Container:
        if not installed():
            raise Unsupported("LXC's tools are not on this host: run scripts/setup, or install Debian's lxc")
        assert spec.container is not None
        if Container.runs(paths):
            raise Conflict(f"container {spec.name} runs already in {paths.root}: stop it first")
        clear_runtime(paths)
        for path in (paths.bundle, paths.log_dir, paths.overlay_work):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not paths.upper.is_symlink():
            for path in (paths.rootfs, paths.upper):
                path.mkdir(mode=0o755, exist_ok=True)
        name = network.namespace_name(paths.root, attempt)
        cable = tap_name(spec.name) if spec.address else ""
        made = cls(spec, paths, {"netns": name, "cable": cable, "pid": 0, "ticks": 0, "boot": ""})
        write_record(paths, spec, made.record)
        network.create(name, cable, mac=spec.mac, addresses=spec.routed_addresses)
        if lower is not None and not paths.rootfs.is_symlink():
            mount(paths, lower)
        made._config.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # LXC follows no link there, which it is where the container was taken over.
        lines = [f"lxc.rootfs.path = dir:{paths.rootfs.resolve()}", "lxc.console.path = none", "lxc.net.0.type = none"]
        made._config.write_text("\n".join([*lines, *spec.container.lxc, ""]))
        return made

    def run(self) -> None:
        """Starts it with LXC's own tool, in its namespace."""
        words = ["lxc-start", "-P", str(self.folder), "-n", self.spec.name, "-d"]
        _call([*words, "--share-net", str(network.RUN / self.netns), "-L", str(self.paths.log_dir / "console.log")])
        self._adopt_process()
        self.plug()
        self.settle()

    def _adopt_process(self) -> None:
        text = _call(["lxc-info", "-P", str(self.folder), "-n", self.spec.name, "-p", "-H"]).strip()
        self._started(int(text) if text.isdigit() else 0)

    def begin_dump(self, images: Path) -> Dumping:
        images.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.paths.log_dir.mkdir(parents=True, exist_ok=True)
        self.paths.criu_options.write_text(bundle.criu_options(restoring=False) + _options(self.pid))
        request = DumpRequest(
            self.pid,
            self.paths.rootfs.resolve(),
            self.paths.criu_options,
            freezer_of(self.pid).folder,
            external=(f"net[{os.stat(f'/proc/{self.pid}/ns/net').st_ino}]:{bundle.NETWORK_KEY}",),
        )
        return Dumping(request, images, self.paths.log_dir)

    def begin_restore(self, images: Path) -> Restoring:
        paths = self.paths
        paths.criu_options.write_text(bundle.criu_options(restoring=True))
        restoring.prepare(images)
        programs = paths.root / "bin"
        programs.mkdir(exist_ok=True)
        wrapper = programs / "criu"
        wrapper.write_text(_wrapper(str(find_criu().path), str(network.RUN / self.netns)))
        wrapper.chmod(0o755)
        words = ["lxc-checkpoint", "-P", str(self.folder), "-n", self.spec.name, "-r", "-D", str(images)]
        environment = {**os.environ, "CRIU_CONFIG_FILE": str(paths.criu_options)}
        environment["PATH"] = f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        begun = Restoring(words, environment, images, paths.log_dir / "restore.said")
        self.note_helper(begun)
        self._images = images
        return begun

    def finish_restore(self, begun: Restoring) -> None:
        said = begun.finish()
        if said:
            criu = last_error(self._images / "restore.log", 3)
            raise GuestError(f"the restore failed: {said[-300:]}{f' (CRIU: {criu})' if criu else ''}")
        self.record.pop("helper", None)
        self._adopt_process()


def _options(pid: int) -> str:
    """What LXC's own dump asks CRIU for, so that LXC's restore finds what it expects."""
    words = ["link-remap", "manage-cgroups full", "ext-mount-map auto", "enable-external-sharing"]
    words += ["enable-external-masters", "enable-fs hugetlbfs", "enable-fs tracefs"]
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers:
            words.append(f"cgroup-root {controllers}:{path}")
    return "\n".join(words) + "\n"


def _wrapper(criu: str, namespace: str) -> str:
    """The program `criu` that LXC finds: gives it the container's namespace, and leaves out an AppArmor profile, which
    LXC names on kernels that have no AppArmor as well."""
    program = shlex.quote(criu)
    return f"""#!/bin/sh
[ "$1" = restore ] || exec {program} "$@"
exec {_NETNS_FD}<{shlex.quote(namespace)}
n=$#
while [ "$n" -gt 0 ]; do
  w=$1
  shift
  n=$((n - 1))
  case $w in
    --lsm-profile) [ -d /sys/kernel/security/apparmor ] || {{ shift; n=$((n - 1)); continue; }} ;;
  esac
  set -- "$@" "$w"
done
exec {program} "$@" --inherit-fd 'fd[{_NETNS_FD}]:{bundle.NETWORK_KEY}'
"""


def end(paths: ContainerPaths, record: dict[str, Any]) -> None:
    """What is LXC's of a container whose processes are gone: a taken-over one is not to be started there again.

    GuestError if LXC runs it all the same, and goes on with that.
    """
    config = record.get("lxc_config")
    if isinstance(config, str) and config:
        with contextlib.suppress(OSError):
            # Somebody may have put it back.
            _hide(Path(config), paths)
        with contextlib.suppress(Unsupported):
            _stop(Path(config))
    folder = paths.root / "lxc"
    if folder.is_dir():
        for place in folder.iterdir():
            with contextlib.suppress(GuestError, Unsupported):
                _call(["lxc-stop", "-k", "-P", str(folder), "-n", place.name])
