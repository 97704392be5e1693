"""Which chunks of a running guest's disk changed, round by round, and their contents.

QEMU itself tells both: its NBD server exports the node with the allocation depth (round 0: all that the overlay holds,
so everything written since the manifest) or with one dirty bitmap (each round after that). The order matters:

    begin   bitmap 0 is added BEFORE the scan, so that a write during the scan is in the next round
    next    one transaction adds bitmap k and disables k-1; then k-1 is exported and read. An enabled bitmap cannot be
            exported read-only, an exported bitmap cannot be removed: client closes, export goes, bitmap goes
    final   while QEMU waits in pre-switchover: the vCPUs are stopped and all I/O is drained, so nothing new can come
    stop    the NBD server goes, before `migrate-continue`: exporting the node after the migration has completed would
            activate it again and take the write lock that the target's guest needs

What a discard or a zero write freed is known from ``base:allocation`` and given as zeros without a read: one fstrim
marks most of a disk dirty, and reading that back would be half a second of downtime.

A chunk found dirty in two rounds running is held back: it would be sent in every round only to be overwritten. It comes
with the first round that finds it clean again, or with the final one. Chunks of a round that was closed early (QEMU
stopped meanwhile) come with the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from haulier.disks import nbdproto
from haulier.disks.nbd import Extent, NbdReader
from haulier.errors import Conflict, GuestError
from haulier.units import CHUNK

PREFIX: Final = "haulier-r"
"""Bitmaps and exports in a QEMU are ours if, and only if, their names begin with this."""
DEPTH_CONTEXT: Final = "qemu:allocation-depth"
BITMAP_CONTEXT: Final = "qemu:dirty-bitmap:"
ZEROS: Final = bytes(CHUNK)
"""The contents of a zero chunk; `Round.items` gives this very object for a chunk that is known to be zero."""
_FORBIDDEN: Final = frozenset({"postmigrate", "inmigrate"})


class QmpLike(Protocol):
    """What is needed of a QMP connection; GuestError when QEMU refuses."""

    def execute(self, command: str, args: dict[str, Any] | None = None, timeout: float = 30) -> Any: ...


class HoldBack:
    """Which dirty chunks are not worth sending yet: those that were dirty in the round before as well.

    A chunk is held for as long as that goes on, and sent once it has been left alone for a round: what piles up for the
    final round is what is hot then, not all that ever was.
    """

    def __init__(self) -> None:
        self.held: set[int] = set()
        self._before: set[int] = set()

    def sort(self, dirty: set[int]) -> set[int]:
        """The chunks to be sent now, given those that are dirty in this round; the others are in `held`."""
        hot = dirty & self._before
        cooled = self.held - dirty
        self.held = hot
        self._before = dirty
        return (dirty - hot) | cooled

    def release(self) -> set[int]:
        """All that is held, to be sent now; nothing is held after that."""
        held, self.held, self._before = self.held, set(), set()
        return held


def covered(extents: Sequence[Extent], flag: int, whole: bool) -> set[int]:
    """Indices of chunks with `flag` set: in all of their bytes (`whole`) or in any of them."""
    found: set[int] = set()
    if not whole:
        for offset, length, flags in extents:
            if flags & flag:
                found.update(range(offset // CHUNK, -(-(offset + length) // CHUNK)))
        return found
    end = extents[-1].offset + extents[-1].length if extents else 0
    start: int | None = None
    # Neighbours with different flags may both have this one: join them before rounding inwards.
    for offset, _length, flags in [*extents, Extent(end, 0, 0)]:
        if flags & flag:
            start = offset if start is None else start
        elif start is not None:
            stop = offset if offset < end else -(-end // CHUNK) * CHUNK
            found.update(range(-(-start // CHUNK), stop // CHUNK))
            start = None
    return found


def runs(indices: set[int], gap: int = 16) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of neighbouring indices; holes up to `gap` are bridged, to ask less often."""
    start = last = -1
    for index in sorted(indices):
        if start >= 0 and index - last > gap:
            yield start, last
            start = index
        elif start < 0:
            start = index
        last = index
    if start >= 0:
        yield start, last


class Round:
    """The chunks of one round. Use `items`, then `close`; or as a context manager.

    `chunks`: indices to send, in order. `dirty`: all that changed in this round, held back or not. `zero`: those of
    `chunks` that read as zeros. `size`: of the disk, in bytes.
    """

    def __init__(
        self, owner: DiskRounds, number: int, reader: NbdReader, dirty: set[int], chunks: list[int], zero: set[int]
    ) -> None:
        self.number = number
        self.dirty = dirty
        self.chunks = chunks
        self.zero = zero
        self.size = reader.size
        self._owner = owner
        self._reader: NbdReader | None = reader
        self._given: set[int] = set()

    def read(self, index: int) -> bytes:
        """The chunk at `index` as it is now, padded with zeros at the disk's end."""
        if self._reader is None:
            raise Conflict(f"disk round {self.number} is closed")
        return _padded(self._reader.read(index * CHUNK, CHUNK))

    def items(self) -> Iterator[tuple[int, bytes]]:
        """(index, contents) of all `chunks` that were not given before. Zero chunks come first and are not read."""
        for index in self.chunks:
            if index in self.zero and index not in self._given:
                self._given.add(index)
                yield index, ZEROS
        if self._reader is None:
            raise Conflict(f"disk round {self.number} is closed")
        todo = [index for index in self.chunks if index not in self._given]
        for offset, data in self._reader.read_many([index * CHUNK for index in todo], CHUNK):
            chunk = _padded(bytes(data))
            self._given.add(offset // CHUNK)
            yield offset // CHUNK, chunk

    @property
    def left(self) -> set[int]:
        """Chunks that `items` has not given yet."""
        return set(self.chunks) - self._given

    def close(self) -> None:
        """Take the export and its bitmap out of QEMU. What was not given yet comes with the next round."""
        if self._reader is None:
            return
        self._reader.close()
        self._reader = None
        self._owner._closed(self)

    def __enter__(self) -> Round:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiskRounds:
    """Dirty rounds over node `node` of the QEMU behind `qmp`, read through an NBD server on `nbd_socket`.

    begin -> next* -> final -> stop; `abort` at any time takes everything out again and the guest goes on. After `abort`
    `begin` may start afresh. Raises GuestError when QEMU refuses, Conflict when called out of order.
    """

    def __init__(self, qmp: QmpLike, node: str = "disk0", nbd_socket: Path | str = "rounds.sock") -> None:
        self._qmp = qmp
        self._node = node
        self._socket = Path(nbd_socket)
        self._number = -1
        self._open: Round | None = None
        self._carried: set[int] = set()
        self._hold = HoldBack()
        self._final = False
        self._broken = False

    @property
    def held_back(self) -> set[int]:
        """Chunks that are not sent for now, because they change in every round."""
        return set(self._hold.held)

    @property
    def carried(self) -> set[int]:
        """Chunks that an early end of a round left over for the next."""
        return set(self._carried)

    def begin(self) -> Round:
        """Round 0: all that was written since the manifest."""
        if self._number >= 0:
            raise Conflict(f"disk rounds of {self._node} have begun already")
        self._check_status()
        clean_up(self._qmp, self._node)
        self._carried, self._hold, self._final, self._broken = set(), HoldBack(), False, False
        self._socket.unlink(missing_ok=True)
        address = {"type": "unix", "data": {"path": str(self._socket)}}
        self._qmp.execute("nbd-server-start", {"addr": address, "max-connections": 8})
        try:
            self._qmp.execute("block-dirty-bitmap-add", self._bitmap(0))
            self._number = 0
            self._export(0, {"allocation-depth": True})
            # Depth 1 is the overlay itself; what lies below it is the manifest.
            return self._read_round(0, DEPTH_CONTEXT, depth=True)
        except BaseException:
            self.abort()
            raise

    def next(self, hold_back: bool = True) -> Round:
        """What was written since the last round began. Closes that round if it is open."""
        self._check_order()
        self._check_status()
        self._close_open()
        last, number = self._number, self._number + 1
        old = {"node": self._node, "name": f"{PREFIX}{last}"}
        actions = [
            {"type": "block-dirty-bitmap-add", "data": self._bitmap(number)},
            {"type": "block-dirty-bitmap-disable", "data": old},
        ]
        self._broken = True
        self._qmp.execute("transaction", {"actions": actions})
        self._number = number
        self._export(last, {"bitmaps": [f"{PREFIX}{last}"]})
        return self._read_round(number, f"{BITMAP_CONTEXT}{PREFIX}{last}", bitmap=last, hold_back=hold_back)

    def final(self) -> Round:
        """The last round, with all that was held back. Only while QEMU waits in pre-switchover (or is paused)."""
        self._check_order()
        status = self._check_status()
        if status == "running":
            raise Conflict(f"the guest on {self._node} still runs: its last disk round cannot be read")
        self._close_open()
        last = self._number
        self._final = self._broken = True
        self._qmp.execute("block-dirty-bitmap-disable", {"node": self._node, "name": f"{PREFIX}{last}"})
        self._export(last, {"bitmaps": [f"{PREFIX}{last}"]})
        context = f"{BITMAP_CONTEXT}{PREFIX}{last}"
        return self._read_round(self._number + 1, context, bitmap=last, hold_back=False)

    def stop(self) -> None:
        """After `final`: close its round and stop QEMU's NBD server. Everything must have been read."""
        self._close_open()
        if self._broken or self._carried:
            raise Conflict("the last disk round was not read to its end; abort instead")
        self._qmp.execute("nbd-server-stop")
        self._socket.unlink(missing_ok=True)
        self._number = -1

    def abort(self) -> None:
        """Take everything out of QEMU again, whatever state it is in. Raises nothing but GuestError for a lost QEMU."""
        if self._open is not None and self._open._reader is not None:
            self._open._reader.close()
            self._open._reader = None
        self._open = None
        self._number = -1
        clean_up(self._qmp, self._node)
        self._socket.unlink(missing_ok=True)

    # -- inside

    def _bitmap(self, number: int) -> dict[str, Any]:
        return {"node": self._node, "name": f"{PREFIX}{number}", "granularity": CHUNK}

    def _check_order(self) -> None:
        if self._number < 0:
            raise Conflict(f"disk rounds of {self._node} have not begun")
        if self._final:
            raise Conflict(f"disk rounds of {self._node} have had their final round; abort and begin again")
        if self._broken:
            # What that round would have found is known to nobody now.
            raise Conflict(f"a disk round of {self._node} failed; abort and begin again")

    def _check_status(self) -> str:
        status = str(self._qmp.execute("query-status")["status"])
        if status in _FORBIDDEN:
            raise Conflict(f"QEMU is in {status}: exporting {self._node} now would take the disk from its new owner")
        return status

    def _export(self, number: int, what: dict[str, Any]) -> None:
        name = f"{PREFIX}{number}"
        base = {"type": "nbd", "id": name, "node-name": self._node, "name": name}
        self._qmp.execute("block-export-add", {**base, **what})

    def _read_round(
        self,
        number: int,
        context: str,
        *,
        depth: bool = False,
        bitmap: int | None = None,
        hold_back: bool = True,
    ) -> Round:
        export = f"{PREFIX}{bitmap if bitmap is not None else 0}"
        # One connection a context: QEMU answers a status request for all contexts of its connection, and allocation
        # is dear, because it is asked of the export below as well (50 ms for 4 GiB, in the middle of a switchover).
        reader = NbdReader(self._socket, export, [context])
        try:
            extents = reader.extents(context)
            if depth:
                extents = [Extent(e.offset, e.length, int(e.flags == 1)) for e in extents]
            dirty = covered(extents, 1, whole=False)
            # Round 0 is everything since the manifest: old writes, no sign of a hot chunk.
            chunks = self._hold.sort(dirty) if hold_back and not depth else dirty | self._hold.release()
            chunks |= self._carried - self._hold.held
            zeros = self._zeros(export, chunks)
        except BaseException:
            reader.close()
            raise
        self._broken = False
        self._carried = set()
        self._open = Round(self, number, reader, dirty, sorted(chunks), zeros)
        self._open_bitmap = bitmap
        return self._open

    def _zeros(self, export: str, chunks: set[int]) -> set[int]:
        """Those of the chunks that read as zeros, found without reading them."""
        if not chunks:
            return set()
        found: set[int] = set()
        with NbdReader(self._socket, export, [nbdproto.ALLOCATION]) as reader:
            for first, last in runs(chunks):
                part = reader.extents(nbdproto.ALLOCATION, first * CHUNK, (last + 1) * CHUNK)
                found |= covered(part, nbdproto.STATE_ZERO, whole=True)
        return found & chunks

    def _close_open(self) -> None:
        if self._open is not None:
            self._open.close()

    def _closed(self, done: Round) -> None:
        """Called by a round that closes: the client is gone, now the export and then the bitmap can go."""
        if self._open is not done:
            return
        self._open = None
        self._carried |= done.left
        number = self._open_bitmap if self._open_bitmap is not None else 0
        self._qmp.execute("block-export-del", {"id": f"{PREFIX}{number}", "mode": "hard"})
        if self._open_bitmap is not None:
            bitmap = {"node": self._node, "name": f"{PREFIX}{self._open_bitmap}"}
            self._qmp.execute("block-dirty-bitmap-remove", bitmap)

    _open_bitmap: int | None = None


def clean_up(qmp: QmpLike, node: str = "disk0") -> None:
    """Remove what rounds left in a QEMU, for instance those of a process that was killed: exports, server, bitmaps.

    Does nothing in a QEMU without leftovers. Never touches exports or bitmaps of others.
    """
    exports = [e["id"] for e in qmp.execute("query-block-exports") if str(e["id"]).startswith(PREFIX)]
    for name in exports:
        _try(qmp, "block-export-del", {"id": name, "mode": "hard"})
    # A server without exports of ours may still be ours; QEMU has one at most, and haulier's guests use it for nothing
    # else. It refuses when there is none.
    _try(qmp, "nbd-server-stop", None)
    for entry in qmp.execute("query-named-block-nodes", {"flat": True}):
        if entry.get("node-name") != node:
            continue
        for bitmap in entry.get("dirty-bitmaps", []):
            name = str(bitmap.get("name", ""))
            if name.startswith(PREFIX):
                qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": name})


def _try(qmp: QmpLike, command: str, args: dict[str, Any] | None) -> None:
    try:
        qmp.execute(command, args)
    except GuestError:
        pass


def _padded(chunk: bytes) -> bytes:
    return chunk if len(chunk) == CHUNK else chunk + bytes(CHUNK - len(chunk))
