"""The source's side of a container's handoff: what `SourceHandoff` does with a QEMU, done with processes.

Files and memory go in rounds while the container runs. Then it is frozen and its cable pulled, and only what is new
since the last round travels, while CRIU writes down the rest. It stays frozen here until the token has moved; any
failure before that thaws it and plugs the cable in again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from haulier.compress.stream import DEFAULT_WINDOW_LOG, level_for
from haulier.containers.arriving import ArrivingPages, names_of
from haulier.containers.checkpoint import BEST_LEVEL, Borrowed, CheckpointSender, digest_of_pages, wanted_files
from haulier.containers.container import Container
from haulier.containers.convergence import Round, Rounds
from haulier.containers.dumping import Dumping
from haulier.containers.files import region_reader
from haulier.containers.images import PagesOf, pages_of
from haulier.containers.layers import chunks_of
from haulier.containers.memory import (
    Areas,
    Piece,
    Places,
    areas_of,
    changed_copies,
    kernel_pages,
    picture_pages,
    read_processes,
)
from haulier.containers.preflight import explain, host_facts, scan
from haulier.containers.queues import Queues
from haulier.containers.tree import Tree
from haulier.containers.upper import UpperRounds, load_signatures, mapped_for_writing
from haulier.disks.transfer import DiskSender
from haulier.errors import Corrupt, GuestError, HandoffFailed, HaulierError, PeerError, Unsupported
from haulier.handoff import foretold, retained
from haulier.handoff.messages import Accept, Arrived, Channel, Prepared, PrepareMemory
from haulier.handoff.residence import container_paths, images_dir, incoming_name
from haulier.handoff.source import SourceHandoff
from haulier.memory.picture import PictureSource
from haulier.process import hurry
from haulier.units import BLOCKS_PER_CHUNK, PAGE

log = logging.getLogger(__name__)
GATHER: Final = 2048
"""Pages gathered before they are compared and sent."""
SMALL_MEMORY: Final = 1 << 20
"""Bytes of pages that are compressed as well as can be."""
TINY: Final = 1024
"""Bytes of a batch that may wait for what comes next, to share a packet with it."""
WORTH_S: Final = 0.03
"""What takes the link longer than this is sent while the dump is written."""
PREPARE_S: Final = 300.0
"""How long the target may take to make ready what it has already."""
SPARE_PIPES: Final = 8
"""Shared memory has files of pages, too."""
TRIALS: Final = 3
"""Of a trial dump that a busy connection spoils."""
MARKS: Final = (
    "frozen",
    "unplugged",
    "files-sent",
    "pages-sent",
    "dumped",
    "end-sent",
    "sent",
    "disk-durable",
    "dump-there",
    "memory-loaded",
    "arrived",
)


class ContainerSource(SourceHandoff):
    """One handoff of a container at its source."""

    _picture: PictureSource | None = None
    _upper: UpperRounds
    _places: Places
    _trial_s = 0.0
    _based = False
    """The target has a picture of it from an earlier stay."""
    _known = b""
    """Files of the dump that it came with at its earlier stay; the target has them, too."""
    _ready = False
    _frozen = False
    _files: CheckpointSender
    _arriving: ArrivingPages
    _streams = False
    """Its picture is made from its processes, later."""
    _begins_on_offer = True
    _clocks = 2
    _probe_bytes = 0
    """Its pages tell the link's rate soon enough, and a small container has hardly more of them than a probe takes."""

    def _adopt(self) -> None:
        self.container = Container.adopt(container_paths(self.site, self.job.guest))
        assert self.spec.container is not None
        self.lower = self.spec.container.lower_chunks
        self._images = images_dir(self.site, self.job.handoff)
        self._trial = self._images / "trial"
        self._trial_borrowed: list[Borrowed] = []
        self._trial_pages: list[PagesOf] = []
        self._dumping: Dumping | None = None
        self._areas: Areas = {}
        self._queues = Queues()
        self._memory_rounds: list[dict[str, Any]] = []

    def _accelerator(self) -> str:
        return ""

    def _host(self) -> dict[str, str]:
        return host_facts()

    # -- preflight -------------------------------------------------------------------------------------------------

    def _preflight(self) -> None:
        """Looks at open files, and tries a dump: it is frozen for that for about as long as for the real one."""
        self.progress.phase("offer", "looking whether the container can be dumped")
        if self.job.options.disk != "full":
            raise Unsupported(f"guest {self.job.guest!r} is a container: all of its files go with it, use --disk full")
        state = self.container.status()
        if state != "running":
            raise GuestError(f"guest {self.job.guest!r} is {state}, not running: 'haulier guest show' tells more")
        problems = scan(self.container.pids())
        if problems:
            raise Unsupported(f"guest {self.job.guest!r} cannot be handed over: {'; '.join(problems)}")
        for left in reversed(range(TRIALS)):
            try:
                self._try_dump()
                return
            except GuestError as error:
                # Its network is not cut for the trial: what is in a connection's queue may move while CRIU reads it.
                if not left or "soccr" not in str(error):
                    text = f"guest {self.job.guest!r} cannot be handed over: {explain(str(error))}"
                    raise Unsupported(text) from None
                log.info("the trial dump of %s is tried again: %s", self.job.guest, error)
                shutil.rmtree(self._trial, ignore_errors=True)

    def _try_dump(self) -> None:
        folder = self._trial
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        began = time.monotonic()
        names = dict.fromkeys(names_of(len(self.container.pids()) + SPARE_PIPES), 0)
        with ArrivingPages(folder, names, keep=False) as arriving:
            self.container.dump(folder)
            self._trial_s = time.monotonic() - began
            sizes = arriving.sizes()
        self._trial_borrowed = self._borrowed(folder, anywhere=True)
        self._trial_pages = pages_of(folder, sizes)

    def _settle(self, accept: Accept) -> None:
        super()._settle(accept)
        if accept.memory_base:
            self._known = retained.kept(self.site, self.spec.name, retained.DUMP)

    def _send_trial(self) -> None:
        """The trial dump: what it has in common with the real one costs little then."""
        assert self._session is not None
        borrowed = self._trial_borrowed
        size = sum(path.stat().st_size for path in wanted_files(self._trial)) - sum(one.length for one in borrowed)
        self._files = CheckpointSender(size, self._known)
        for message in self._files.files(self._trial, borrowed, trial=True):
            self._session.send(Channel.CHECKPOINT, message, more=True)
        shutil.rmtree(self._trial)

    def _worth_indexing(self) -> set[bytes]:
        """Of layers that the target has, memory resembles little more than the data of programs that run."""
        wanted: dict[bytes, set[int]] = {}
        for changed in changed_copies(areas_of(self.container.pids())):
            wanted.setdefault(os.fsencode(changed.path.lstrip("/")), set()).update(changed.at.tolist())
        assert self.spec.container is not None
        with contextlib.suppress(HaulierError):
            return chunks_of(self.spec.container, self._manifest, self._store, wanted)
        # It only makes messages smaller.
        return set()

    # -- files -----------------------------------------------------------------------------------------------------

    def _begin_rounds(self) -> None:
        """Nothing has to be told: what a container writes is found by looking."""

    def _first_disk(self, sender: DiskSender, first: object) -> None:
        """The layers that the target lacks, then what the container wrote, in rounds."""
        # Shares its packets with the question that follows.
        self._send_trial()
        if sender.offer_manifest().wire_bytes > 4096:
            sender.commit()
        chunks = len(self._manifest) - self.lower
        self._latest = self._manifest
        paths = self.container.paths
        known = load_signatures(paths.signatures)
        tree = Tree.read(region_reader(self._chunk), chunks * BLOCKS_PER_CHUNK)
        self._upper = UpperRounds(paths.upper, chunks, self._chunk, tree, known, paths.rootfs)
        for _ in range(4):
            if self._upper_round()["wire_bytes"] <= max(65536, self._rate / 8 * 0.2):
                break

    def _chunk(self, number: int) -> bytes:
        return self._store.get(self._latest[self.lower + number])

    def _upper_round(self, *, last: bool = False) -> dict[str, Any]:
        """What was written since the last round; durable at the target when this returns, but for the last round."""
        sender = self._sender
        assert sender is not None
        began = time.time()
        sent = sender.send_round(self._upper_items(last), ask=not last)
        if last or sent.chunks_dirty:
            sender.commit(final=last, wait=not last)
        self._latest = sender.manifest
        self._observe()
        number, files = len(self._disk_rounds) + 1, self._upper.changed_files
        return self._note_disk_round(sent, began, round=number, last=last, dirty=sent.chunks_dirty, files=files)

    def _upper_items(self, last: bool) -> Iterator[tuple[int, bytes]]:
        for number, data in self._upper.items(lambda: mapped_for_writing(self.container.pids), last=last):
            self._check()
            yield self.lower + number, data

    # -- memory ----------------------------------------------------------------------------------------------------

    def _start_memory(self, accept: Accept) -> None:
        assert self._session is not None and self._control is not None
        self.progress.phase("memory", "sending memory while the container runs")
        pages = picture_pages(self.spec.memory_mib)
        base = retained.open_base(self.site, self.spec.name, self.spec.uuid, accept.memory_base)
        kept = retained.kept(self.site, self.spec.name, retained.PLACES) if accept.memory_base else b""
        self._places = Places.decode(kept, pages) if kept else Places(pages)
        if not accept.manifest:
            self._control.send(PrepareMemory(accept.memory_base))
        level = self.job.options.level or level_for(self._rate)
        window_log = DEFAULT_WINDOW_LOG
        if not self.job.options.level and sum(one.count for one in self._trial_pages) * PAGE < SMALL_MEMORY:
            level, window_log = BEST_LEVEL, 20
        mirror = self.site.mirror(self.job.handoff)
        self._based = bool(accept.memory_base)
        known = kernel_pages() if accept.same_vdso else b""
        picture = PictureSource(mirror, pages, base, self._finder, level=level, window_log=window_log, dictionary=known)
        self._picture = picture
        self._session.send(Channel.MEMORY, picture.begin().data, more=True)
        self._send_layout(early=True)

    def _memory_round(self) -> dict[str, Any]:
        """Compares all memory with what the target has and sends what differs; returns when nearly all has left."""
        picture, session = self._picture, self._session
        assert picture is not None and session is not None
        began, wire = time.time(), picture.counters.wire_bytes
        seen = sent = 0
        if not self._memory_rounds and not self._based:
            self._send_files_pages()
        for numbers, contents in self._gathered():
            seen += len(numbers)
            sent += self._send_pages(numbers, contents)
        entry = {
            "round": len(self._memory_rounds) + 1,
            "pages": seen,
            "sent": sent,
            "wire_bytes": picture.counters.wire_bytes - wire,
            "seconds": round(time.time() - began, 4),
            "at": round(began - self._marks["begin"], 4),
        }
        self._memory_rounds.append(entry)
        return entry

    def _gathered(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """(numbers, pages) of all processes."""
        return self._gather(read_processes(self._areas or areas_of(self.container.pids())))

    def _gather(self, pieces: Iterator[Piece]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """(numbers, pages), some megabytes at a time."""
        numbers: list[NDArray[np.int64]] = []
        contents: list[NDArray[np.uint8]] = []
        count = 0
        for piece in pieces:
            numbers.append(self._places.numbers(piece.key, piece.pages))
            contents.append(piece.contents)
            count += len(piece.pages)
            if count >= GATHER:
                yield np.concatenate(numbers), np.concatenate(contents)
                numbers, contents, count = [], [], 0
        if count:
            yield np.concatenate(numbers), np.concatenate(contents)

    def _send_files_pages(self) -> None:
        """What the target has in the container's files of pages that were changed: only the changes follow then."""
        for numbers, contents in self._gather(self._originals()):
            known = self._finder.find(contents) >= 0
            self._send_pages(numbers[known], contents[known])

    def _originals(self) -> Iterator[Piece]:
        for changed in changed_copies(areas_of(self.container.pids())):
            with contextlib.suppress(OSError):
                yield changed.original()

    def _send_pages(self, numbers: NDArray[np.int64], contents: NDArray[np.uint8], *, more: bool = False) -> int:
        """Those that the target has not got; how many. `more`: something follows at once."""
        picture, session = self._picture, self._session
        assert picture is not None and session is not None
        rows = picture.differing(numbers, contents)
        for batch in picture.send(numbers[rows], contents[rows]):
            self._check()
            # The layout follows the first round.
            small = len(batch.data) < TINY
            session.send(Channel.MEMORY, batch.data, more=small and (more or not self._memory_rounds))
            if not self._ending:
                window = self._window()
                while not session.wait_below(window.wire, Channel.MEMORY, timeout=0.1):
                    self._check()
                self._observe()
                self.progress.left(0, self._memory_left())
        return len(rows)

    def _send_layout(self, *, early: bool = False) -> None:
        """Which pages the dump will have, as the trial had them: the target puts them together while there is time."""
        picture, session = self._picture, self._session
        assert picture is not None and session is not None
        pages = [(one.name, self._numbers(one)) for one in self._trial_pages]
        session.send(Channel.CHECKPOINT, self._files.layout(picture.counters.raw_bytes, pages, early=early), more=early)

    def _numbers(self, pages: PagesOf) -> NDArray[np.int64]:
        """Numbers in the picture, in the order of the file."""
        found = [self._places.numbers(key, some) for key, some in pages.stretches]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _memory_left(self) -> int:
        if not self._memory_rounds or self._picture is None:
            return self.spec.memory_bytes // 20
        return int(self._memory_rounds[-1]["wire_bytes"])

    def _converge(self) -> None:
        """Rounds until the last transfer is forecast to be short enough, or does not become shorter any more."""
        assert self._session is not None and self._control is not None
        rounds = Rounds(self.job.options.downtime_ms / 1000)
        waits = 0.0
        while True:
            began = time.monotonic()
            memory = self._memory_round()
            if len(self._memory_rounds) == 1:
                self._send_layout()
                self._begin_dump()
            files = self._upper_round()
            while not self._session.wait_below(16_384, Channel.MEMORY, timeout=0.1):
                self._check()
            for message in self._control.poll():
                if not isinstance(message, Prepared):
                    raise HandoffFailed(f"site {self.job.peer!r} said {type(message).__name__} too early")
                self._ready = True
            self._observe()
            wire = memory["wire_bytes"] + files["wire_bytes"]
            done = rounds.add(Round(time.monotonic() - began, wire, self._rate))
            self._timeline.append(
                {
                    "at": round(time.time() - self._marks["begin"], 3),
                    "wire": wire,
                    "forecast_s": round(rounds.forecast, 4),
                }
            )
            if done and self._ready:
                return
            if done:
                waits = waits or time.monotonic()
                self._wait_prepared()
                if not self._ready and time.monotonic() - waits > PREPARE_S:
                    raise HandoffFailed(
                        f"site {self.job.peer!r} had not unpacked the layers of {self.job.guest!r} and put its memory "
                        f"together {PREPARE_S:g} s after all of it was sent: see the worker's log there"
                    )
            self._check()

    def _begin_dump(self) -> None:
        """CRIU starts, and memory is taken for what it will write, while pages are still on their way."""
        folder = self._images / "dump"
        folder.mkdir(mode=0o700)
        self._arriving = ArrivingPages(folder, {one.name: one.count * PAGE for one in self._trial_pages})
        self._dumping = self.container.begin_dump(folder)

    def _wait_prepared(self) -> None:
        """The target still unpacks layers, or puts pages together; meanwhile nothing is gained by further rounds."""
        assert self._control is not None
        with contextlib.suppress(PeerError):
            self._control.wait(Prepared, 2)
            self._ready = True

    # -- switchover ------------------------------------------------------------------------------------------------

    def _switch_over(self) -> None:
        assert self._control is not None and self._sender is not None and self._picture is not None
        self.progress.phase("switchover", "the container is frozen")
        self._ending = True
        folder, dumping = self._images / "dump", self._dumping
        assert dumping is not None
        with self._arriving as arriving:
            dumping.ready()
            hurry(os.getpid())
            self._marks["stop"] = time.time()
            self._frozen = True
            self.container.freeze()
            # CRIU maps memory of its own into the processes for the time of the dump.
            self._areas = areas_of(self.container.pids())
            self._marks["frozen"] = time.time()
            with _Beside(lambda: self._dump(dumping)) as dump:
                # While CRIU writes: what it will find is in memory already, and the processes change it no more. But
                # looking at all of memory slows CRIU down; a little that changed is soon sent after.
                self._upper_round(last=True)
                self._marks["files-sent"] = time.time()
                if self._memory_rounds[-1]["wire_bytes"] * 8 > WORTH_S * self._rate:
                    self._memory_round()
                self._marks["pages-sent"] = time.time()
                dump.result()
            contents = arriving.result()
        self._marks["dumped"] = time.time()
        check = self._send_dump(folder, contents)
        self._marks["sent"] = time.time()
        self._sender.wait_committed()
        self._arrived = arrived = self._control.wait(Arrived, 120)
        self._marks["arrived"] = time.time()
        self._marks["disk-durable"] = arrived.durable_at - self._control.clock_offset
        self._marks["dump-there"] = arrived.came_at - self._control.clock_offset
        self._marks["memory-loaded"] = arrived.loaded_at - self._control.clock_offset
        self._compare(arrived, check)

    def _borrowed(self, folder: Path, *, anywhere: bool = False) -> list[Borrowed]:
        return self._queues.find(folder, self.container.pids(), self.container.paths.rootfs, anywhere=anywhere)

    def _dump(self, dumping: Dumping) -> None:
        """Writes down what is frozen. The cable is pulled as late as can be: until then what is under way arrives."""
        try:
            dumping.finish(self._pull)
        except GuestError as error:
            raise GuestError(f"guest {self.job.guest!r} cannot be dumped: {explain(str(error))}") from None

    def _pull(self) -> None:
        self.container.unplug()
        self._marks["unplugged"] = time.time()

    def _send_dump(self, folder: Path, arrived: Mapping[str, NDArray[np.uint8]]) -> bytes:
        """All files of the dump, pages as numbers in the picture. Digests of the pages files, for a check."""
        picture, session = self._picture, self._session
        assert picture is not None and session is not None
        borrowed = self._borrowed(folder)
        for message in self._files.files(folder, borrowed):
            # What is small shares a packet with the end, without which it is of no use.
            session.send(Channel.CHECKPOINT, message, urgent=True, more=len(message) < TINY)
        sizes = {name: contents.nbytes for name, contents in arrived.items()}
        found = [
            (one, arrived[one.name] if one.name in arrived else _pages(folder / one.name))
            for one in pages_of(folder, sizes)
        ]
        pages: list[tuple[str, NDArray[np.int64]]] = []
        for one, contents in found:
            numbers = self._numbers(one)
            self._late_pages += self._send_pages(numbers, contents, more=True)
            pages.append((one.name, numbers))
        session.send(Channel.CHECKPOINT, self._files.end(picture.counters.raw_bytes, pages, borrowed), urgent=True)
        self._marks["end-sent"] = time.time()
        digests = [digest_of_pages(contents) for _, contents in found]
        session.send(Channel.CHECKPOINT, self._files.digests(digests), urgent=True)
        if not self.job.options.check:
            return b""
        return b"".join(blake3(contents.reshape(-1).data).digest() for _, contents in found)

    def _compare(self, arrived: Arrived, memory: bytes) -> None:
        """If asked for, the whole dump must be the same there as well."""
        assert self._picture is not None
        self._trust(arrived, self._picture.counters.raw_bytes, self._picture.digest())
        if self.job.options.check:
            equal = arrived.memory == memory
            self.report["check"] = {"files": len(memory) // 32, "memory_equal": equal, "seconds": arrived.check_s}
            if not equal:
                raise Corrupt(
                    f"the dump of {self.job.guest!r} differs at site {self.job.peer!r}: nothing was lost here"
                )

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """It runs at the target: keeps what serves the way back, clears away the frozen processes."""
        assert self._picture is not None and self._sender is not None
        done = time.time()
        places = self._places.encode()
        name = self._say_finish(places)
        self._store.save_manifest(incoming_name(self.job.handoff), self._sender.manifest)
        self.report.update(self._figures(done))
        self.report.update(foretold.told(self._forecast, self.report))
        self._picture.keep()
        self._picture.close()
        beside = {retained.PLACES: places, retained.DUMP: self._files.kept}
        self._left(name, self.site.mirror(self.job.handoff), beside)

    def _figures(self, done: float) -> dict[str, Any]:
        assert self._picture is not None
        counters = self._picture.counters
        return self._told(done, (*MARKS, "token", "running"), counters.wire_bytes + self._files.wire_bytes) | {
            "kind": "container",
            "trial_ms": round(self._trial_s * 1000, 1),
            "memory": {
                "raw_bytes": counters.raw_bytes,
                "wire_bytes": counters.wire_bytes,
                "checkpoint_bytes": self._files.wire_bytes,
                "late_pages": self._late_pages,
                "rounds": self._memory_rounds,
                "kinds": counters.as_dict(),
            },
        }

    _late_pages = 0

    def _resume(self) -> None:
        if self._dumping is not None:
            self._dumping.abort()
        if self._frozen and self.container.alive():
            self.container.thaw()

    def _drop_memory(self) -> None:
        if self._picture is not None:
            self._picture.close()
        shutil.rmtree(self._images, ignore_errors=True)

    def _let_go(self) -> None:
        shutil.rmtree(self._images, ignore_errors=True)


def _pages(path: Path) -> NDArray[np.uint8]:
    """The pages of a file, u8 (n, 4096), where they lie."""
    if not path.stat().st_size:
        return np.zeros((0, PAGE), np.uint8)
    return np.memmap(path, np.uint8, "r").reshape(-1, PAGE)


class _Beside:
    """Runs something in a thread of its own; leaving the block waits for it, whatever happened in the block."""

    def __init__(self, work: Any) -> None:
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="dump", daemon=True)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> _Beside:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join()

    def result(self) -> None:
        """Waits, and raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
