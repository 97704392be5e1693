"""The target's side of a container's handoff: files and pages are collected, processes restored stopped, then the vote.

A thread of its own builds: it unpacks layers as soon as their chunks are here, follows what the container writes, and
in the end restores. What it made stays stopped and unplugged until the token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from haulier.chunks.manifest import Manifest
from haulier.containers import container as containers
from haulier.containers.checkpoint import CheckpointReceiver, Numbered
from haulier.containers.container import Container
from haulier.containers.drafts import Draft, Drafting
from haulier.containers.files import region_reader, write_tree
from haulier.containers.layers import make_layers, regions, sync_files
from haulier.containers.memory import Reserve, kernel_pages, picture_pages
from haulier.containers.preflight import same_kernel_pages
from haulier.containers.restoring import Restoring
from haulier.containers.tree import Tree
from haulier.containers.upper import save_signatures
from haulier.errors import Cancelled, Corrupt, HaulierError
from haulier.handoff import retained
from haulier.handoff.custody import happen
from haulier.handoff.messages import Arrived, Channel, Finish, MemoryReady, Prepared, PrepareMemory, Running
from haulier.handoff.ownership import Event, State
from haulier.handoff.residence import container_paths, images_dir
from haulier.handoff.target import TargetHandoff
from haulier.memory.picture import PICTURE
from haulier.memory.target_proxy import TargetProxy
from haulier.process import hurry
from haulier.session import Session
from haulier.units import BLOCKS_PER_CHUNK, PAGE

log = logging.getLogger(__name__)
EARLY_RESERVE: Final = 512 << 20
"""More memory is not held from the beginning on, for others may need it meanwhile."""


class ContainerTarget(TargetHandoff):
    """One handoff of a container at its target."""

    _begins_on_offer = True
    _proxy: TargetProxy | None = None
    _container: Container | None = None
    _checkpoint: CheckpointReceiver
    _builder: threading.Thread | None = None
    _upper_tree: Tree | None = None
    _upper_manifest: Manifest | None = None
    _lower: list[Path] | None = None
    _check_s = 0.0
    _came_at = 0.0
    _check_digests = b""
    _restoring: Restoring | None = None
    _hasher: _Hasher | None = None
    _reserve: Reserve | None = None
    _blank = True
    """The picture was all zero at first."""
    _touched: NDArray[np.bool_] | None = None
    _drafts_made = False
    _prepared = False
    _synced: Future[None]
    """The files as they were written last are on disk."""
    _asked = False
    """The source has said something of the disk."""
    _owes_ready = False

    # -- collected -------------------------------------------------------------------------------------------------

    def _prepare_early(self, session: Session, manifest: Manifest) -> None:
        self._start_receiver(manifest)
        session.on(Channel.DISK, self._disk)
        self._prepare_memory(PrepareMemory(self.job.memory_base), early=True)

    def _prepare_memory(self, news: PrepareMemory, early: bool = False) -> None:
        """`early`: before the source has asked what is here of the disk; with that answer it is told, in one packet."""
        if self._receiver is None or self._proxy is not None:
            raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
        spec, session = self.spec, self.control.session
        assert spec.container is not None
        self.container_paths = container_paths(self.site, spec.name)
        self.container_paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.container_paths.bundle.mkdir(exist_ok=True)
        self._images = images_dir(self.site, self.job.handoff)
        self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
        base = retained.open_base(self.site, spec.name, spec.uuid, news.memory_base)
        self._blank = base is None
        pages = picture_pages(spec.memory_mib)
        known = kernel_pages() if same_kernel_pages(self.offer.host) else b""
        mirror = self.site.mirror(self.job.handoff)
        self._proxy = TargetProxy(mirror, base, self._space, max_memory=pages * PAGE, dictionary=known, packs=False)
        before = retained.kept(self.site, spec.name, retained.DUMP) if news.memory_base else b""
        self._checkpoint = CheckpointReceiver(self._images, pages, before)
        self._drafts: dict[str, Draft] = {}
        self._drafting = Drafting()
        self._feeding = threading.Lock()
        self._tasks: queue.Queue[tuple[Manifest, bool] | str | None] = queue.Queue()
        self._changed = threading.Condition()
        self._syncs = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._builder = threading.Thread(target=self._build, name="builder", daemon=True)
        self._builder.start()
        self._tasks.put((self._receiver.manifest, False))
        session.on(Channel.MEMORY, self._pages)
        session.on(Channel.CHECKPOINT, self._files)
        with self._lock:
            later = self._owes_ready = early and not self._asked
        if not later:
            self.control.send(MemoryReady())

    def _disk(self, data: bytes) -> None:
        with self._lock:
            owed, self._owes_ready, self._asked = self._owes_ready, False, True
        if owed:
            self.control.send(MemoryReady(), more=True)
        super()._disk(data)

    def _pages(self, data: bytes) -> None:
        assert self._proxy is not None
        try:
            with self._feeding:
                self._proxy.feed(data)
                if self._touched is None and self._proxy.mirror is not None:
                    # From the first page on.
                    self._touched = self._proxy.watch()
        except Exception as error:
            self.control.tell(error)
        self._came()

    def _files(self, data: bytes) -> None:
        try:
            self._checkpoint.handle(data)
        except Exception as error:
            self.control.tell(error)
        self._came()

    def _came(self) -> None:
        with self._changed:
            layout = self._checkpoint.layout
            if layout is not None and self._touched is not None:
                assert self._proxy is not None
                due, settled = self._drafting.due(layout[0], self._checkpoint.settled, self._proxy.raw_bytes)
                if due:
                    self._tasks.put("settled" if settled else "draft")
            self._changed.notify_all()

    def _committed(self, manifest: Manifest, final: bool) -> None:
        if self._builder is not None:
            self._tasks.put((manifest, final))
        super()._committed(manifest, final)

    # -- built -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                self._go_on()
                if isinstance(task, str):
                    self._draft(settled=task == "settled")
                    continue
                manifest, final = task
                self._unpack(manifest)
                if self._lower is None and not final:
                    continue
                self._follow(manifest)
                if final:
                    self._go_on()
                    self._restore()
                    return
        except Exception as error:
            if not self._closing:
                self.control.tell(error)

    def _go_on(self) -> None:
        """Raises Cancelled when the handoff is over: what is made here after that, nobody clears away."""
        if self._closing:
            raise Cancelled(f"the handoff of guest {self.spec.name!r} is over: nothing more is made of it here")

    def _draft(self, *, settled: bool) -> None:
        """What is there of the files of pages; `settled`: all that the first round brought is."""
        assert self._checkpoint.layout is not None
        pages = self._checkpoint.layout[1]
        self._assemble(pages)
        size = sum(len(numbers) for _, numbers in pages) * PAGE
        if self._reserve is None and (settled or size <= EARLY_RESERVE):
            self._reserve = Reserve(size)
        if settled:
            self._drafts_made = True
            self._maybe_prepared()

    def _unpack(self, manifest: Manifest) -> None:
        """Layers and namespace, once all chunks of the layers are here."""
        spec = self.spec
        assert spec.container is not None
        if self._lower is not None:
            return
        wanted = {fp for region in regions(spec.container, manifest) for fp in region.unique()}
        if self._store.missing(wanted):
            return
        lower = make_layers(self.site.layers, self._store, spec.container, manifest, check=self._go_on)
        self._go_on()
        self._lower = lower
        self._container = containers.driver_of(spec).prepare(spec, self.container_paths, None, self.job.handoff)
        self._container.hush()
        self._maybe_prepared()

    def _maybe_prepared(self) -> None:
        """Once, when layers, files of pages and memory are there: what is missing then is for the container's stop."""
        if self._lower is not None and self._drafts_made and not self._prepared:
            self._prepared = True
            self.control.send(Prepared())

    def _follow(self, manifest: Manifest) -> None:
        """Makes the directory of what the container wrote what `manifest` says."""
        assert self.spec.container is not None
        lower, before = self.spec.container.lower_chunks, self._upper_manifest
        if before is not None and before.digest == manifest.digest:
            return

        def get(chunk: int) -> bytes:
            self._go_on()
            return self._store.get(manifest[lower + chunk])

        def changed(chunk: int) -> bool:
            return before is None or before[lower + chunk] != manifest[lower + chunk]

        tree = Tree.read(region_reader(get), (len(manifest) - lower) * BLOCKS_PER_CHUNK)
        if before is None and self.container_paths.upper.exists():
            # An attempt that was killed may have left files of which this tree knows nothing.
            shutil.rmtree(self.container_paths.upper)
        write_tree(self.container_paths.upper, tree, get, self._upper_tree, changed)
        self._upper_tree, self._upper_manifest = tree, manifest
        # After each round, so that there is little to wait for when the container stands still.
        self._synced = self._syncs.submit(sync_files, self.container_paths.upper)

    def _restore(self) -> None:
        """Waits for the dump to be whole, and restores the processes; they stay stopped."""
        assert self._container is not None and self._lower is not None and self._proxy is not None
        container = self._container
        containers.mount(self.container_paths, self._lower)
        # CRIU starts while the dump is still being written at the source.
        self._restoring = container.begin_restore(self._images)
        # Not before: LXC's monitor, which lives as long as the container, would have it too.
        hurry(os.getpid())
        save_signatures(self.container_paths.signatures, self.container_paths.upper)
        with self._changed:
            self._changed.wait_for(self._dump_is_here)
        if self._closing:
            return
        self._came_at = time.time()
        self._assemble(self._checkpoint.pages)
        self._checkpoint.give_back(self.container_paths.rootfs)
        self._hasher = _Hasher([self._drafts[name] for name, _ in self._checkpoint.pages])
        # Beside it: CRIU needs some milliseconds before it fills memory, as giving this back does. Not earlier either,
        # for a virtual host may give what lies free to its own host within those.
        releasing = threading.Thread(target=self._release, name="reserve", daemon=True)
        releasing.start()
        container.widen(self._images)
        container.finish_restore(self._restoring)
        releasing.join()
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._checkpoint.digests is not None)
        if self._closing:
            return
        if self._hasher.result() != self._checkpoint.digests:
            raise Corrupt("the pages that were put together are not those that were dumped: try again")
        # Whoever votes has all of it on disk: what the container writes next is on top of that, come what may.
        self._synced.result()
        if self.offer.options.check:
            began = time.monotonic()
            for name, _ in self._checkpoint.pages:
                self._check_digests += blake3((self._images / name).read_bytes()).digest()
            self._check_s = time.monotonic() - began
        self._loaded_at = time.time()
        self.control.tell("loaded")
        # While the token is on its way.
        container.quieten()

    _closing = False

    def _release(self) -> None:
        if self._reserve is not None:
            self._reserve.release()

    def _dump_is_here(self) -> bool:
        end = self._checkpoint.end
        return self._closing or (end is not None and self._proxy is not None and self._proxy.raw_bytes >= end.stream)

    def _assemble(self, pages: Numbered) -> None:
        """The files of pages, from the picture: what is right in them already is left as it is."""
        assert self._proxy is not None
        with self._feeding:
            mirror = self._proxy.mirror
            if mirror is None or list(mirror.blocks) != [PICTURE]:
                raise Corrupt("the pages of a container came as something else: run the same haulier at both sites")
            assert self._touched is not None
            touched, picture = self._touched, mirror.view
        for name, numbers in pages:
            if name not in self._drafts:
                self._drafts[name] = Draft(self._images / name, picture, touched)
                if self._blank:
                    self._drafts[name].begin(numbers)
            self._drafts[name].follow(numbers)
            if self._checkpoint.end is None:
                self._drafts[name].digest()

    def _maybe_arrived(self) -> None:
        """Votes once the processes are restored and the final manifest is durable here."""
        if self._voted or not self._loaded_at or self._receiver is None or not self._receiver.final:
            return
        assert self._proxy is not None
        self._voted = True
        happened = happen(self.journal, self.spec.name, Event.COMPLETE, decided=True, handoff=self.job.handoff)
        self.control.send(
            Arrived(
                happened.after.pending,
                self._proxy.raw_bytes,
                self._proxy.digest(),
                self._receiver.manifest.digest,
                self._check_digests,
                self._check_s,
                self._durable_at,
                self._loaded_at,
                self._came_at,
            )
        )
        self._send(happened)
        self.progress.phase("ready")

    # -- ownership and the end -------------------------------------------------------------------------------------

    def _copy_alive(self) -> bool:
        return self._container is not None and self._container.alive()

    def _run(self, after: State) -> bool:
        assert self._container is not None
        at = self._container.cont()
        self._running = True
        self.outcome = "done"
        # With the word that it was taken.
        self.control.send(Running(at), more=True)
        return True

    def _moved(self) -> None:
        super()._moved()
        assert self._container is not None
        # What restored connections said before the clients' network followed was answered to the old site.
        self._container.nudge()
        self._container.settle()

    def _settle(self) -> None:
        super()._settle()
        shutil.rmtree(self._images, ignore_errors=True)

    def _finish(self, news: Finish) -> None:
        if self._proxy is None or not news.memory_id:
            return
        self._proxy.keep()
        self._proxy.close()
        row = self.journal.guest(self.spec.name)
        meta = retained.Retained(id=news.memory_id, guest=self.spec.name, uuid=self.spec.uuid, epoch=row.epoch)
        beside = {retained.PLACES: news.places, retained.DUMP: self._checkpoint.kept}
        retained.keep(self.site, meta, self.site.mirror(self.job.handoff), beside)

    def _stop_building(self) -> None:
        self._closing = True
        if self._builder is not None:
            self._tasks.put(None)
            with self._changed:
                self._changed.notify_all()
            self._builder.join(120)
            self._syncs.shutdown(wait=False)
        if self._restoring is not None and not self._taken:
            self._restoring.abort()
        self._release()
        if self._hasher is not None:
            self._hasher.join()
        for draft in getattr(self, "_drafts", {}).values():
            draft.close()

    def _discard(self) -> None:
        self._stop_building()
        super()._discard()

    def _close(self, session: Session) -> None:
        self._stop_building()
        if self._proxy is not None:
            self._proxy.close()
        with contextlib.suppress(HaulierError):
            shutil.rmtree(images_dir(self.site, self.job.handoff), ignore_errors=True)
        super()._close(session)


class _Hasher:
    """Digests of files, computed in a thread of its own."""

    def __init__(self, drafts: list[Draft]) -> None:
        self._drafts = drafts
        self._digests: list[bytes] = []
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for draft in self._drafts:
            self._digests.append(draft.digest())

    def result(self) -> list[bytes]:
        """Waits for them, in the order of the files."""
        self._thread.join()
        return self._digests

    def join(self) -> None:
        self._thread.join()
