"""The process that serves one guest's disk to its QEMU, and the handle on it.

    python -m haulier.disks.export --store DIR --manifest NAME --socket PATH --control PATH [--detach --log FILE]

It is detached: it belongs to the guest, not to the agent, and goes on when the agent dies. Whoever comes next finds it
by its control socket and its state file beside that (``<control>.json``: pid, start time, and all that is needed to
start it again). While it runs it holds a lock on ``<control>.lock``, so two can never serve the same guest. When it
dies QEMU's client waits (reconnect-delay) and connects to the next one under the same socket.

The control socket takes one JSON object a line and answers each with one:

    {"command": "swap", "manifest": NAME}    serve another manifest of the same size from now on
    {"command": "stats"}                     counters, the current manifest, its digest
    {"command": "fill", "mode": MODE}        how to fetch what is missing: "off", "background" or "full"
    {"command": "heat"}                      write the counts of reads to ``<control>.heat``
    {"command": "warm"}                      take counts of an earlier stay from there
    {"command": "stop"}                      stop; the answer comes before the process ends

An answer is {"ok": true, ...} or {"ok": false, "error": text, "code": exit code of the error's class}.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from haulier import priority
from haulier.chunks.store import ChunkStore
from haulier.disks.fill import Filler, Mode, hints_at, sources_for
from haulier.disks.heat import read_heat
from haulier.disks.server import PATIENCE_S, ExportServer
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, PeerError, UnknownThing, UsageError, by_code
from haulier.process import ProcessId

log = logging.getLogger(__name__)

MAX_WORDS: Final = 64 * 1024
"""Of what a waiting export is told."""

MAX_LINE: Final = 64 << 10
MAX_SOCKET_PATH: Final = 100
START_S: Final = 30.0
ANSWER_S: Final = 30.0
STOP_S: Final = 10.0
ARRIVING: Final = "incoming/"
"""Manifests of copies that are being built are called so."""


@dataclass(frozen=True)
class ExportState:
    """What the state file says: how to recognise the process and how to start it again."""

    pid: int
    ticks: int
    boot: str
    """With `pid` the process (`ProcessId`): pids are used again."""
    store: str
    manifest: str
    socket: str
    control: str
    log: str
    mode: str = Mode.BACKGROUND.value
    """How what is missing is fetched."""

    @classmethod
    def load(cls, control: Path) -> ExportState:
        """Read the state file beside `control`. UnknownThing when there is none, Corrupt when it is not readable."""
        path = _beside(control, ".json")
        try:
            raw = json.loads(path.read_bytes())
            if "started" in raw:
                # An export outlives the version of haulier that began it.
                old = ProcessId.begun(int(raw["pid"]), float(raw["started"]))
                raw |= {"ticks": old.ticks, "boot": old.boot} if old is not None else {"ticks": 0, "boot": ""}
            return cls(**{name: kind(raw[name]) for name, kind in _STATE_FIELDS.items()}, mode=str(raw.get("mode", "")))
        except FileNotFoundError:
            raise UnknownThing(f"no disk export has run at {control}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path} is not the state of a disk export ({error}); start the export anew") from error

    @property
    def process(self) -> ProcessId:
        """Which one serves it, or did."""
        return ProcessId(self.pid, self.ticks, self.boot)

    def save(self) -> None:
        path = _beside(Path(self.control), ".json")
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(asdict(self)))
        new.replace(path)


_STATE_FIELDS: Final[dict[str, Callable[[Any], Any]]] = {
    "pid": int, "ticks": int, "boot": str, "store": str, "manifest": str, "socket": str, "control": str, "log": str
}  # fmt: skip


def waiting_export() -> subprocess.Popen[bytes]:
    """A process that has started and waits to be told what to export, by `DiskExport.start`.

    Half a second of a handoff is otherwise the start of a Python process. It ends when its standard input closes.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "haulier.disks.export", "--standby"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


class DiskExport:
    """A handle on a running export. Any process may have one; none owns the export."""

    def __init__(self, state: ExportState) -> None:
        self.state = state
        self.control = Path(state.control)

    @classmethod
    def start(
        cls,
        store_dir: Path,
        manifest_name: str,
        socket: Path,
        control: Path,
        log: Path,
        patience_s: float = PATIENCE_S,
        mode: str = "",
        waiting: subprocess.Popen[bytes] | None = None,
    ) -> DiskExport:
        """Start an export and return when it accepts connections. `waiting` (see `waiting_export`) becomes it.

        Conflict when one is running at `control` or something else listens on `socket`; UnknownThing when the store
        or manifest does not exist.
        """
        words = ["--detach", "--store", str(Path(store_dir).absolute()), "--manifest", manifest_name]
        words += ["--socket", str(Path(socket).absolute()), "--control", str(Path(control).absolute())]
        words += ["--log", str(Path(log).absolute()), "--patience", str(patience_s)]
        words += ["--mode", mode] if mode else []
        process = waiting if waiting is not None and waiting.poll() is None else waiting_export()
        try:
            _, said = process.communicate(json.dumps(words).encode(), START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise PeerError(f"the disk export of {manifest_name} did not start within {START_S:.0f} s") from None
        if process.returncode:
            text = said.decode("utf-8", "replace").strip().splitlines()
            raise by_code(process.returncode)(text[-1] if text else f"disk export of {manifest_name} did not start")
        return cls.attach(control)

    @classmethod
    def restart(cls, control: Path) -> DiskExport:
        """Start an export that has died again, with the manifest it served last."""
        state = ExportState.load(control)
        paths = Path(state.socket), Path(control), Path(state.log)
        return cls.start(Path(state.store), state.manifest, *paths, mode=state.mode)

    @classmethod
    def attach(cls, control: Path) -> DiskExport:
        """A handle on the export that runs at `control`. UnknownThing when none does."""
        found = cls(ExportState.load(Path(control).absolute()))
        if not found.alive():
            raise UnknownThing(f"the disk export at {control} (pid {found.pid}) does not run any more; restart it")
        return found

    @property
    def pid(self) -> int:
        return self.state.pid

    @property
    def socket(self) -> Path:
        """The NBD socket."""
        return Path(self.state.socket)

    def alive(self) -> bool:
        """Whether that very process runs."""
        return self.state.process.alive()

    def swap(self, manifest_name: str) -> None:
        """Serve another manifest from now on; when this returns every new request sees it."""
        self._ask({"command": "swap", "manifest": manifest_name})

    def stats(self) -> dict[str, Any]:
        """Counters since the start (see `server.Counters`), and `manifest`, `digest` (hex), `size`, `pid`."""
        return self._ask({"command": "stats"})

    def fill(self, mode: str) -> None:
        """Fetch what is missing in this way from now on: "off", "background" or "full"."""
        self._ask({"command": "fill", "mode": mode})

    def heat(self) -> bytes | None:
        """How often each chunk was read, one byte a chunk."""
        answer = self._ask({"command": "heat"})
        return read_heat(_beside(self.control, ".heat"), int(answer["chunks"]))

    def warm(self, counts: bytes) -> None:
        """Counts from an earlier stay elsewhere."""
        _beside(self.control, ".heat").write_bytes(counts)
        self._ask({"command": "warm"})

    def stop(self) -> None:
        """Stop the export, wait for its end and remove its files; fine when it is gone already.

        Never signals another process, and leaves the files of a successor alone.
        """
        try:
            self._ask({"command": "stop"}, timeout_s=STOP_S)
        except HaulierError:
            # It may hang or be gone; a signal goes only to the process that the state file names.
            self.state.process.signal(signal.SIGTERM)
        if not _until(lambda: not self.alive(), STOP_S):
            self.state.process.signal(signal.SIGKILL)
            if not _until(lambda: not self.alive(), STOP_S):
                raise Conflict(f"the disk export at {self.control} (pid {self.pid}) cannot be killed")
        try:
            with _lock(self.control):
                for path in (self.socket, self.control):
                    path.unlink(missing_ok=True)
                _beside(self.control, ".json").unlink(missing_ok=True)
                _beside(self.control, ".heat").unlink(missing_ok=True)
                _beside(self.control, ".lock").unlink(missing_ok=True)
        except (Conflict, NoRoom):
            pass

    def _ask(self, question: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        what = f"disk export at {self.control} (pid {self.pid})"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            try:
                connection.connect(str(self.control))
                peer = _peer_pid(connection)
                if peer != self.pid:
                    raise Conflict(f"{what} is gone: process {peer} listens there now")
                connection.sendall(json.dumps(question).encode() + b"\n")
                line = b""
                while not line.endswith(b"\n"):
                    part = connection.recv(MAX_LINE)
                    if not part or len(line) > MAX_LINE:
                        raise PeerError(f"{what} gave no whole answer")
                    line += part
            except OSError as error:
                if isinstance(error, HaulierError):
                    raise
                raise PeerError(f"{what} cannot be asked ({error})") from error
        try:
            answer = json.loads(line)
            if answer["ok"] is True:
                return dict(answer)
            raise by_code(int(answer["code"]))(str(answer["error"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, HaulierError):
                raise
            raise PeerError(f"{what} answered nonsense ({error})") from error


# -- the process


class _Process:
    """The running export: listens on both sockets until told to stop."""

    def __init__(self, options: argparse.Namespace, ready: Callable[[], None]) -> None:
        self._options = options
        self._ready = ready
        self._store = ChunkStore(options.store, create=False)
        manifest = self._store.load_manifest(options.manifest)
        self._server = ExportServer(self._store, manifest, options.patience)
        self._name: str = options.manifest
        self._filler: Filler | None = None
        self._mode = Mode(options.mode)
        # A store in a site's directory: what is missing there can be had from other sites.
        self._site = options.store.absolute().parent
        if (self._site / "site.toml").exists():
            self._filler = Filler(
                self._store, self._server.heat, sources_for(self._site), Mode.OFF, hints_at(self._site)
            )
            self._server.elsewhere = self._filler
        self._warm()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        paths: tuple[Path, Path] = (self._options.socket, self._options.control)
        for path in paths:
            _free(path)
        old = os.umask(0o177)
        try:
            disk = await loop.create_unix_server(self._server.connection, str(paths[0]))
            control = await asyncio.start_unix_server(self._control, str(paths[1]), limit=MAX_LINE)
        finally:
            os.umask(old)
        self._save_state()
        log.info("serving %s (%d bytes) at %s", self._name, self._server.manifest.size, paths[0])
        self._ready()
        self._follow()
        await self._stopping.wait()
        log.info("stopping")
        for path in paths:
            path.unlink(missing_ok=True)
        disk.close()
        control.close()
        self._server.heat.save(self._heat_file())
        self._server.close()
        if self._filler is not None:
            await self._filler.close()
        self._store.close()

    def _heat_file(self) -> Path:
        return _beside(self._options.control, ".heat")

    def _warm(self) -> None:
        counts = read_heat(self._heat_file(), len(self._server.manifest))
        if counts is not None:
            self._server.heat.merge(counts)

    def _follow(self) -> None:
        """Fetch what the disk lacks. Of a copy that is still arriving only what is read: the rest is on its way."""
        if self._filler is None:
            return
        if self._name.startswith(ARRIVING):
            # Nobody looks what is missing: that would be in the way of a guest that stands still.
            self._filler.arriving(self._name, self._server.manifest)
            return
        self._filler.mode = self._mode
        task = asyncio.get_running_loop().create_task(self._filler.follow(self._name, self._server.manifest))
        self._tasks.add(task)
        task.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("what %s lacks cannot be told: %s", self._name, error)

    def _save_state(self) -> None:
        options = self._options
        ExportState(
            **asdict(ProcessId.this()),
            store=str(options.store),
            manifest=self._name,
            socket=str(options.socket),
            control=str(options.control),
            log=str(options.log or ""),
            mode=self._mode.value,
        ).save()

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    answer = {"ok": True, **await self._answer(line)}
                except HaulierError as error:
                    answer = {"ok": False, "error": str(error), "code": error.exit_code}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:
            log.warning("control connection: %s", error)
        except asyncio.CancelledError:
            # The loop ends; the streams module would log a cancelled handler as an error.
            pass
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            question = json.loads(line)
            command = question["command"]
        except (ValueError, KeyError, TypeError):
            raise UsageError("a control message is one JSON object a line, with a command") from None
        if command == "swap":
            name = question.get("manifest")
            if not isinstance(name, str):
                raise UsageError("swap needs the name of a manifest")
            loop = asyncio.get_running_loop()
            self._server.swap(await loop.run_in_executor(None, self._store.load_manifest, name))
            self._name = name
            self._save_state()
            self._follow()
            log.info("serving %s from now on", name)
            return {}
        if command == "stats":
            manifest = self._server.manifest
            facts: dict[str, Any] = {
                "manifest": self._name,
                "digest": manifest.digest.hex(),
                "size": manifest.size,
                "pid": os.getpid(),
            }
            if self._filler is not None:
                facts["fill"] = self._filler.facts()
            return {**self._server.counters.as_dict(), **facts}
        if command == "fill":
            try:
                self._mode = Mode(question.get("mode"))
            except ValueError:
                raise UsageError(f"no such way to fill a disk: {str(question.get('mode'))[:40]!r}") from None
            self._save_state()
            if self._filler is not None:
                self._filler.set_mode(self._mode)
            return {}
        if command == "heat":
            await asyncio.get_running_loop().run_in_executor(None, self._server.heat.save, self._heat_file())
            return {"chunks": len(self._server.manifest)}
        if command == "warm":
            self._warm()
            return {}
        if command == "stop":
            # The answer goes out first.
            asyncio.get_running_loop().call_soon(self._stopping.set)
            return {}
        raise UsageError(f"no such command: {str(command)[:40]!r}; there are swap, stats, fill, heat, warm and stop")


def main(arguments: list[str] | None = None) -> int:
    """Run the export; the exit code is that of the error's class.

    With ``--standby`` alone the arguments come as a JSON list from standard input; nothing there ends it.
    """
    if (sys.argv[1:] if arguments is None else arguments) == ["--standby"]:
        words = sys.stdin.read(MAX_WORDS)
        if not words:
            return 0
        arguments = json.loads(words)
        priority.usual()  # of one that was started by a worker in waiting
    parser = argparse.ArgumentParser(prog="haulier.disks.export", description="Serves a disk's manifest as NBD.")
    parser.add_argument("--store", type=Path, required=True, help="directory of the chunk store")
    parser.add_argument("--manifest", required=True, help="name of the manifest in the store")
    parser.add_argument("--socket", type=Path, required=True, help="unix socket for NBD")
    parser.add_argument("--control", type=Path, required=True, help="unix socket for control")
    parser.add_argument("--log", type=Path, help="file that messages are appended to")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds to wait for a missing chunk")
    parser.add_argument("--mode", choices=[m.value for m in Mode], default=Mode.BACKGROUND.value, help="how to fill")
    parser.add_argument("--detach", action="store_true", help="go on in the background once ready")
    options = parser.parse_args(arguments)
    try:
        for path in (options.socket, options.control):
            if len(str(path).encode()) > MAX_SOCKET_PATH:
                raise UsageError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter one")
        with _lock(options.control) as lock:
            # Two processes must not both hold the lock: the child inherits it, the parent leaves by _exit.
            done = _detach(options.log) if options.detach else None
            _log_to(options.log)
            _serve(options, done)
            del lock
    except HaulierError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return error.exit_code
    return 0


def _serve(options: argparse.Namespace, done: IO[bytes] | None) -> None:
    def ready() -> None:
        if done is not None:
            done.write(b"\0")
            done.close()

    try:
        asyncio.run(_run(options, ready))
    except HaulierError as error:
        log.error("%s", error)
        if done is None:
            raise
        if not done.closed:
            done.write(bytes([error.exit_code]) + str(error).replace("\n", " ").encode())
            done.close()
        os._exit(error.exit_code)
    except BaseException as error:
        log.exception("the export failed")
        if done is not None and not done.closed:
            done.write(b"\1" + f"the disk export failed: {error!r}; see {options.log}".encode())
            done.close()
        raise


async def _run(options: argparse.Namespace, ready: Callable[[], None]) -> None:
    await _Process(options, ready).run()


def _detach(log_path: Path | None) -> IO[bytes]:
    """Go on in a child, in a session of its own; the parent waits for what the child writes to the returned file.

    A zero byte: ready. Another: the exit code, and a message.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            message = said.read()
        code = message[0] if message else 1
        if code:
            print(message[1:].decode("utf-8", "replace") or "the disk export died at its start", file=sys.stderr)
            sys.stderr.flush()
        os._exit(code)
    os.close(reading)
    os.setsid()
    os.chdir("/")
    with open(os.devnull, "r+b") as null, open(log_path or os.devnull, "ab") as output:
        os.dup2(null.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    return os.fdopen(writing, "wb", buffering=0)


def _log_to(path: Path | None) -> None:
    form = "%(asctime)s %(levelname)s %(message)s"
    if path is None:
        logging.basicConfig(level=logging.INFO, format=form)
    else:
        logging.basicConfig(level=logging.INFO, format=form, filename=path)


def _lock(control: Path) -> IO[bytes]:
    """The lock that says that an export runs at `control`; it is held until the file is closed by the last holder."""
    path = _beside(control, ".lock")
    while True:
        try:
            lock = open(path, "ab")  # noqa: SIM115  (the caller closes it)
        except OSError as error:
            raise NoRoom(f"cannot make {path} ({error})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Conflict(f"a disk export runs at {control} already; attach to it or stop it") from None
        # The file may have been removed between the two steps: then this lock keeps nobody out.
        try:
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def _free(path: Path) -> None:
    """Remove a socket that nobody listens on. Conflict when somebody does, or it is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"{path} exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise Conflict(f"{path} is in use ({error}); choose another path") from error
    raise Conflict(f"another process listens at {path}; stop it or choose another path")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _peer_pid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[:4], sys.byteorder, signed=True)


def _until(condition: Callable[[], bool], deadline_s: float) -> bool:
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    sys.exit(main())
