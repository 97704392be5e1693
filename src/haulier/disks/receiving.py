"""The target's side of a disk transfer: a reaction to messages.

Nothing that comes is believed: sizes are bounded, each chunk is rebuilt and fingerprinted before it is stored, and a
commit is acknowledged only when the new manifest has the digest that the source named and every chunk of it is durable
here. A chunk that cannot be rebuilt from what is here (a recipe on a chunk that went corrupt, say) is left out, found
missing at the commit, and asked for whole. Anything else that is wrong ends the transfer: the source is told why, in
its own words of error, and `handle` raises.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from haulier.chunks import recipe
from haulier.chunks.blocks import BlockSpace
from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest, apply_delta
from haulier.chunks.store import ChunkStore
from haulier.disks import wire
from haulier.disks.patches import apply_patch
from haulier.disks.sending import new_chunks
from haulier.disks.shared import space_fingerprints
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, PeerError, UnknownThing
from haulier.units import FINGERPRINT

MAX_WINDOW_LOG: Final = 27


class ReceiverCounters:
    """What has come so far."""

    def __init__(self) -> None:
        self.messages = 0
        self.wire_bytes = 0
        self.chunks_literal = 0
        self.chunks_recipe = 0
        self.chunks_patch = 0
        self.chunks_unmade = 0
        """Could not be rebuilt here; asked for again at the commit."""
        self.commits = 0

    def as_dict(self) -> dict[str, int]:
        return dict(self.__dict__)


class DiskReceiver:
    """Takes the disk from `base` to each manifest that the source commits, under `manifest_name` in the store.

    `handle` takes the messages in order, from one thread at a time. `on_commit(manifest, final)` is called when chunks
    and manifest are durable, before the acknowledgement: the place to swap the disk export. `on_lacking` is told which
    chunks of the base are not here. With `partial`, chunks may be left behind: a commit asks only for those that
    changed in the final round. `meta` is kept with the manifest.
    """

    def __init__(
        self,
        store: ChunkStore,
        base: Manifest,
        space: BlockSpace,
        send: Callable[[bytes], None],
        lease: str,
        *,
        manifest_name: str,
        on_commit: Callable[[Manifest, bool], None] | None = None,
        on_lacking: Callable[[list[bytes]], None] | None = None,
        partial: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self._store = store
        self._base = base
        self._space = space
        self._send = send
        self._lease = lease
        self._name = manifest_name
        self._on_commit = on_commit
        self._on_lacking = on_lacking
        self._partial = partial
        self._meta = meta
        self._positions: dict[bytes, int] = {}
        self._reader = wire.ChunkReader(MAX_WINDOW_LOG)
        self._manifest = base
        self._delta = bytearray()
        # A delta cannot be longer than one that changes every chunk.
        self._max_delta = 4096 + len(base) * (FINGERPRINT + 8)
        self._checked = False
        self._failed: HaulierError | None = None
        self._cond = threading.Condition()
        self._final = False
        self.counters = ReceiverCounters()
        self.committed_chunks: list[bytes] = []
        """Chunks appended to the block space by commits, in that order; the same at both ends."""

    @property
    def manifest(self) -> Manifest:
        """The last committed manifest; the base before the first commit."""
        return self._manifest

    @property
    def final(self) -> bool:
        """The last commit was the final one."""
        return self._final

    @property
    def error(self) -> HaulierError | None:
        """Why the transfer ended, if it failed."""
        return self._failed

    def handle(self, message: bytes) -> None:
        """Take one message. Raises what ended the transfer; the source has been told. Ignores all that comes after."""
        if self._failed is not None:
            return
        self.counters.messages += 1
        self.counters.wire_bytes += len(message)
        try:
            self._handle(message)
        except HaulierError as error:
            self._end(error)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                failure: HaulierError = NoRoom(
                    f"no space left for the disk's chunks in the store ({error}); free some with gc, or give it more"
                )
            else:
                failure = PeerError(f"the chunk store cannot be written ({error})")
            self._end(failure)
            raise failure from error

    def wait_final(self, timeout_s: float) -> bool:
        """Wait until the final commit is durable here. False when it is not in time; raises what ended the transfer."""
        with self._cond:
            self._cond.wait_for(lambda: self._final or self._failed is not None, timeout_s)
            if self._failed is not None:
                raise self._failed
            return self._final

    def _end(self, error: HaulierError) -> None:
        with self._cond:
            self._failed = error
            self._cond.notify_all()
        try:
            self._send(wire.Failed(error.exit_code, str(error)).encode())
        except HaulierError:
            # The session is gone as well; the first error is the one to know.
            pass

    def _handle(self, message: bytes) -> None:
        if not message or len(message) > wire.MAX_MESSAGE:
            raise Corrupt(f"a disk message of {len(message)} bytes; at most {wire.MAX_MESSAGE} are taken")
        kind = message[0]
        if self._final:
            raise Conflict("a disk message came after the final commit")
        if kind == wire.OFFER:
            self._offer(wire.Offer.decode(message))
        elif kind == wire.ASK:
            ask = wire.Ask.decode(message)
            self._send(wire.Answer(ask.number, self._lacking(ask.fingerprints)).encode())
        elif kind == wire.CHUNKS:
            for entry in self._reader.entries(message):
                self._store_entry(entry)
        elif kind == wire.DELTA:
            if len(self._delta) + len(message) - 1 > self._max_delta:
                raise Corrupt(f"a manifest delta of more than {self._max_delta} bytes")
            self._delta += message[1:]
        elif kind == wire.COMMIT:
            delta, self._delta = bytes(self._delta), bytearray()
            self._commit(wire.Commit.decode(message), delta)
        else:
            raise Corrupt(f"a disk message of kind {kind}, which this version does not know; update haulier here")

    def _offer(self, offer: wire.Offer) -> None:
        if offer.digest != self._manifest.digest or offer.size != self._manifest.size:
            raise Conflict(
                f"the source's disk starts from manifest {offer.digest[:6].hex()}, this site has "
                f"{self._manifest.digest[:6].hex()}; start the handoff again"
            )
        if offer.space != len(self._space):
            raise Conflict(
                f"the source's block space has {offer.space} chunks, this site's {len(self._space)}; start again"
            )
        order = [fp for fp in dict.fromkeys(self._manifest.chunks()) if fp != ZERO]
        lacking = self._lacking(order)
        self._positions = {fp: position for position, fp in enumerate(order)}
        self._send(wire.Lacking(lacking, self._lacking(space_fingerprints(self._space))).encode())
        if self._on_lacking is not None and any(lacking):
            self._on_lacking([fp for fp, flag in zip(order, lacking, strict=True) if flag])

    def came(self, fingerprints: Sequence[bytes]) -> None:
        """Chunks of the base came from elsewhere and can be read here: the source need not send them. Any thread."""
        positions = [self._positions[fp] for fp in fingerprints if fp in self._positions]
        for at in range(0, len(positions), wire.MAX_HERE):
            self._send(wire.Here(positions[at : at + wire.MAX_HERE]).encode())

    def _lacking(self, fingerprints: list[bytes]) -> list[bool]:
        missing = set(self._store.missing(fingerprints, self._lease))
        return [fp in missing for fp in fingerprints]

    def _store_entry(self, entry: wire.Entry) -> None:
        if entry.kind == wire.LITERAL:
            self.counters.chunks_literal += 1
            fp = fingerprint(entry.data)
            if fp[: wire.PREFIX] != entry.prefix:
                raise Corrupt(f"chunk {entry.prefix.hex()} came with other contents; start the handoff again")
            self._store.put(entry.data, fp, self._lease)
            return
        try:
            if entry.kind == wire.RECIPE:
                self.counters.chunks_recipe += 1
                data = recipe.decode(entry.data, self._space)
            else:
                self.counters.chunks_patch += 1
                data = apply_patch(self._old(entry.index), entry.data)
            fp = fingerprint(data)
        except (Corrupt, UnknownThing):
            self.counters.chunks_unmade += 1
            return
        if fp[: wire.PREFIX] != entry.prefix:
            self.counters.chunks_unmade += 1
            return
        self._store.put(data, fp, self._lease)

    def _old(self, index: int) -> bytes:
        if index >= len(self._manifest):
            raise Corrupt(f"a patch on chunk {index} of a disk of {len(self._manifest)}")
        return self._store.get(self._manifest[index])

    def _commit(self, commit: wire.Commit, delta: bytes) -> None:
        if commit.delta_length != len(delta):
            raise Corrupt(f"a commit speaks of {commit.delta_length} bytes of delta, {len(delta)} came")
        new = apply_delta(self._manifest, delta)
        if new.digest != commit.digest:
            raise Corrupt("a commit leads to another manifest than it names; start the handoff again")
        places = new.changed(self._manifest)
        changes = {index: new[index] for index in places}
        # The first commit answers for the base as well; later its chunks are kept by the manifest that was saved.
        needed = new.unique() if not self._checked else frozenset(changes.values()) - {ZERO}
        if self._partial and not commit.final:
            needed = frozenset()
        elif self._partial:
            # What changed last was sent, and the source's pins were written before it: it has to be here.
            needed = frozenset(changes.values()) - {ZERO}
        lacking = self._store.missing(needed)
        if not lacking:
            try:
                # Chunks and manifest become durable in one transaction, and it checks again that all of them are here.
                self._store.save_manifest(self._name, new, self._meta, partial=self._partial, look=not self._partial)
            except UnknownThing:
                lacking = self._store.missing(new.unique())
                if not lacking:
                    raise
        if lacking:
            self._send(wire.Missing(commit.number, lacking[: wire.MAX_MISSING]).encode())
            return
        self._checked = True
        self._space_append(new_chunks(changes, self.committed_chunks))
        self._manifest = new
        self.counters.commits += 1
        if self._on_commit is not None:
            self._on_commit(new, commit.final)
        with self._cond:
            self._final = commit.final
            self._cond.notify_all()
        self._send(wire.Committed(commit.number, new.digest).encode())

    def _space_append(self, fingerprints: Iterable[bytes]) -> None:
        added = list(fingerprints)
        if added:
            self._space.append(added)
        self.committed_chunks += added
