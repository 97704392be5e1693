"""The source's side of a disk transfer.

    offer_manifest     the target says which chunks of the base manifest it lacks; those go first
    send_round*        changed chunks: asked for first (rounds while the guest runs) or just sent (the last round, where
                       a round trip costs downtime)
    commit             after any of these: the target makes chunks and manifest durable and acknowledges

The order of messages is the order in which the target sees them, so a recipe may refer to whatever was sent before it.
One thread calls these; `handle` (the target's answers) and `fail` may come from another. All wait without limit of
their own except `patience_s` without any answer, which is longer than the longest outage that a session survives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, TypeVar

from haulier.chunks import recipe
from haulier.chunks.blocks import BlockIndex, BlockSpace
from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest, encode_delta
from haulier.chunks.store import ChunkStore
from haulier.disks import wire
from haulier.disks.patches import make_patch
from haulier.disks.rounds import ZEROS
from haulier.disks.shared import SharedBlocks
from haulier.errors import Conflict, Corrupt, HaulierError, PeerError, by_code
from haulier.units import CHUNK

T = TypeVar("T")

DEFAULT_WINDOW_LOG: Final = 24
PATIENCE_S: Final = 300.0
ASK_BATCH: Final = 256
KEEP_BYTES: Final = 32 << 20
"""Contents kept in memory while the target is asked about them; beyond that they are read from the store again."""


@dataclass
class DiskCounters:
    """Where the bytes of the disk came from at the target. Bytes of a kind are after compression, as sent."""

    chunks_dirty: int = 0
    """Chunks looked at."""
    chunks_unchanged: int = 0
    """Dirty, but with the contents they had."""
    chunks_zero: int = 0
    chunks_at_target: int = 0
    """The target had them already."""
    chunks_recipe: int = 0
    recipe_bytes: int = 0
    recipe_raw_bytes: int = 0
    """Length of the recipes before compression."""
    chunks_patch: int = 0
    patch_bytes: int = 0
    chunks_sent: int = 0
    """Sent whole."""
    sent_bytes: int = 0
    sent_raw_bytes: int = 0
    chunks_elsewhere: int = 0
    """Came to the target from other sites."""
    chunks_left: int = 0
    """Left behind: the target fetches them later."""
    chunks_resent: int = 0
    """Sent again because the target could not make them from what it had."""
    wire_bytes: int = 0
    """All message bytes to the target: chunks, questions, deltas."""
    seconds: float = 0.0

    def __sub__(self, other: DiskCounters) -> DiskCounters:
        return DiskCounters(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> DiskCounters:
        return replace(self)

    def as_dict(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


RoundReport = DiskCounters
"""What one round did: the same figures."""


@dataclass
class LayerCounters:
    """What was sent of one layer of the disk; `wire_bytes` is its share of the batches that it travelled in."""

    chunks: int = 0
    at_target: int = 0
    elsewhere: int = 0
    """Came to the target from other sites meanwhile."""
    left: int = 0
    """Left behind, to be fetched when they are needed."""
    wire_bytes: int = 0


class DiskSender:
    """Brings the target from `base`, which it may have only in part, to each new manifest.

    `send` takes one message (bytes) for the ordered channel and may block. Raises what the target reported (NoRoom when
    it has no space, Corrupt, ...), PeerError when it went away.
    """

    def __init__(
        self,
        store: ChunkStore,
        base: Manifest,
        space: BlockSpace,
        index: BlockIndex,
        send: Callable[[bytes], None],
        lease: str,
        *,
        level: int = 3,
        window_log: int = DEFAULT_WINDOW_LOG,
        patience_s: float = PATIENCE_S,
        layer_of: Callable[[bytes], str] | None = None,
        order: Sequence[str] = (),
        recipes: bool = True,
    ) -> None:
        """`layer_of` says what a chunk belongs to; `order` in which order layers of the base manifest go.

        Without `recipes` a chunk goes whole, or as a patch.
        """
        self._store = store
        self._layer_of = layer_of or (lambda fp: "")
        self._order = {layer: number for number, layer in enumerate(order)}
        self._batch_layers: dict[str, int] = {}
        self.layers: dict[str, LayerCounters] = {layer: LayerCounters() for layer in order}
        self._send_message = send
        self._lease = lease
        self._patience_s = patience_s
        self._recipes = recipes
        self._shared = SharedBlocks(space, index, store)
        self._writer = wire.ChunkWriter(level, window_log)
        self._committed = base
        self._changes: dict[int, bytes] = {}
        self._at_target: set[bytes] = set()
        self._sent: set[bytes] = set()
        self._base_order: list[bytes] = []
        self._here: set[bytes] = set()
        self.left: set[bytes] = set()
        """Chunks that the target has to fetch later (`keep_back`)."""
        self._unanswered: dict[int, list[bytes]] = {}
        self._kept: dict[bytes, tuple[bytes, int]] = {}
        self._batched: list[bytes] = []
        self._number = 0
        self._cond = threading.Condition()
        self._lacking: wire.Lacking | None = None
        self._answers: deque[wire.Answer] = deque()
        self._commit_answer: wire.Committed | wire.Missing | None = None
        self._commit_open: wire.Commit | None = None
        self._error: HaulierError | None = None
        self.counters = DiskCounters()
        self.lacking_chunks = 0
        """Of the base manifest, once the target has said so."""
        self.committed_chunks: list[bytes] = []
        """Chunks appended to the block space by commits, in that order; the same at both ends."""

    @property
    def manifest(self) -> Manifest:
        """The base with all that was given to `send_round` so far."""
        return self._committed.replace(self._changes) if self._changes else self._committed

    @property
    def committed(self) -> Manifest:
        """The manifest that is durable at the target (the base before the first commit)."""
        return self._committed

    @property
    def index(self) -> BlockIndex:
        """The block index without the blocks that the target lacks: what pages of memory may refer to."""
        return self._shared.index

    # -- called by the source's engine

    def offer_manifest(self, hot: Container[bytes] | None = None) -> RoundReport:
        """Ask which chunks of the base the target lacks, and send them. Ends without an acknowledgement: `commit`.

        With `hot` only those are sent, the others are left behind. What comes to the target from elsewhere meanwhile
        is not sent.
        """
        self._check_idle()
        before, began = self.counters.copy(), time.monotonic()
        base = self._committed
        self._base_order = [fp for fp in dict.fromkeys(base.chunks()) if fp != ZERO]
        self._post(wire.Offer(base.size, len(self._shared.space), base.digest).encode())
        lacking = self._await(lambda: self._lacking, "the offer of the base manifest")
        order = self._base_order
        if len(lacking.base) != len(order) or len(lacking.space) != len(self._shared.space):
            raise PeerError("the target answered about another manifest than was offered; start the handoff again")
        self._shared.lacking(lacking.space)
        wanted = [fp for fp, flag in zip(order, lacking.base, strict=True) if flag]
        self._at_target = set(order) - set(wanted)
        self.counters.chunks_at_target += len(self._at_target)
        for fp in self._at_target:
            self._layer(self._layer_of(fp)).at_target += 1
        # Stable: within a layer in the order of the disk.
        wanted.sort(key=lambda fp: self._order.get(self._layer_of(fp), len(self._order)))
        self.lacking_chunks = len(wanted)
        for fp in wanted:
            self._use_here()
            if fp in self._at_target:
                continue
            if hot is not None and fp not in hot:
                self.left.add(fp)
                self.counters.chunks_left += 1
                self._layer(self._layer_of(fp)).left += 1
                continue
            self._add(fp, self._store.get(fp), None)
            self._sent.add(fp)
        self._flush()
        return self._report(before, began)

    def send_round(
        self,
        items: Iterable[tuple[int, bytes]],
        ask: bool = True,
        leave: bool = False,
    ) -> RoundReport:
        """Take (chunk index, 64 KiB) pairs and bring the target what it lacks of them.

        `ask=False` sends what is not known to be there without asking, and saves a round trip. `leave`: they are kept
        here, and the target fetches them later.
        """
        self._check_idle()
        before, began = self.counters.copy(), time.monotonic()
        question: list[bytes] = []
        for index, data in items:
            self._check()
            self.counters.chunks_dirty += 1
            fp = self._take(index, data)
            if fp is None:
                continue
            if leave:
                self.left.add(fp)
                self.counters.chunks_left += 1
                self._layer(self._layer_of(fp)).left += 1
                continue
            self.left.discard(fp)
            if not ask:
                self._add(fp, data, index)
                self._sent.add(fp)
                continue
            self._keep(fp, data, index)
            question.append(fp)
            self._sent.add(fp)
            if len(question) >= ASK_BATCH:
                self._ask(question)
                question = []
            self._use_answers(wait=False)
        if question:
            self._ask(question)
        while self._unanswered:
            self._use_answers(wait=True)
        self._flush()
        return self._report(before, began)

    def commit(self, final: bool = False, wait: bool = True) -> Manifest:
        """Have the target make all that was sent durable, with the new manifest. Returns that manifest.

        `final` says that this is the state the guest will run on. With `wait=False` it returns at once and
        `wait_committed` must follow before anything else is sent.
        """
        self._check_idle()
        self._flush()
        new = self.manifest
        self._open_commit(new, final)
        if not wait:
            return new
        return self.wait_committed()

    def wait_committed(self) -> Manifest:
        """Wait for the acknowledgement of `commit(wait=False)`."""
        resent: set[bytes] = set()
        while True:
            commit = self._commit_open
            if commit is None:
                raise Conflict("no commit is under way")
            # The source needs its own copy durable too, for the way back; the wait is a good time for that.
            self._store.commit()
            self._await(self._answered_commit, "the commit of the disk")
            answer = self._commit_answer
            assert answer is not None
            new = self.manifest
            if isinstance(answer, wire.Committed):
                if answer.number != commit.number or answer.digest != new.digest:
                    raise PeerError("the target acknowledged another manifest than was sent; start the handoff again")
                self._commit_open = None
                self._absorb(new)
                return new
            self._resend(new, answer, resent)
            self._commit_open = None
            self._open_commit(new, commit.final)

    # -- called by the session

    def handle(self, message: bytes) -> None:
        """A message from the target. Never raises: what is wrong with it is raised where the answer is waited for."""
        with self._cond:
            try:
                self._handle(message)
            except HaulierError as error:
                self._error = self._error or error
            self._cond.notify_all()

    def fail(self, error: HaulierError) -> None:
        """Raise `error` in whoever waits here or calls next: the session is lost, or the handoff was cancelled."""
        with self._cond:
            self._error = self._error or error
            self._cond.notify_all()

    def _handle(self, message: bytes) -> None:
        kind = message[0] if message else 0
        if kind == wire.LACKING:
            self._lacking = wire.Lacking.decode(message)
        elif kind == wire.ANSWER:
            answer = wire.Answer.decode(message)
            if len(self._answers) > len(self._unanswered):
                raise Corrupt("the target answers questions that were not asked")
            self._answers.append(answer)
        elif kind == wire.COMMITTED:
            self._commit_answer = wire.Committed.decode(message)
        elif kind == wire.MISSING:
            self._commit_answer = wire.Missing.decode(message)
        elif kind == wire.HERE:
            positions = wire.Here.decode(message).positions
            if max(positions) >= len(self._base_order):
                raise Corrupt("the target speaks of chunks that are not in this disk")
            self._here.update(self._base_order[position] for position in positions)
        elif kind == wire.FAILED:
            failed = wire.Failed.decode(message)
            raise by_code(failed.code)(f"at the target: {failed.text}")
        else:
            raise Corrupt(f"the target sent a disk message of kind {kind}, which this version does not know")

    # -- inside

    def _use_here(self) -> None:
        """Take note of what came to the target from elsewhere."""
        if not self._here:
            return
        with self._cond:
            here, self._here = self._here, set()
        for fp in here - self._at_target - self._sent:
            self._at_target.add(fp)
            self._shared.present(fp)
            self.counters.chunks_elsewhere += 1
            self._layer(self._layer_of(fp)).elsewhere += 1

    def _take(self, index: int, data: bytes) -> bytes | None:
        """Note the chunk's new contents; its fingerprint when the target may lack it."""
        if len(data) != CHUNK or not 0 <= index < len(self._committed):
            raise ValueError(f"chunk {index} of {len(self._committed)} with {len(data)} bytes")
        fp = ZERO if data is ZEROS else fingerprint(data)
        was = self._changes.get(index) or self._committed[index]
        if fp == was:
            self.counters.chunks_unchanged += 1
            return None
        if fp == self._committed[index]:
            del self._changes[index]
        else:
            self._changes[index] = fp
        if fp == ZERO:
            self.counters.chunks_zero += 1
            return None
        if fp in self._at_target or fp in self._sent:
            self.counters.chunks_at_target += 1
            return None
        # The source keeps it as well: it answers for it until the target has it, and the way back starts from it.
        self._store.put(data, fp, self._lease)
        return fp

    def _keep(self, fp: bytes, data: bytes, index: int) -> None:
        small = len(self._kept) * CHUNK < KEEP_BYTES
        self._kept[fp] = (data if small else b"", index)

    def _ask(self, question: list[bytes]) -> None:
        self._number += 1
        self._unanswered[self._number] = question
        self._post(wire.Ask(self._number, question).encode())

    def _use_answers(self, wait: bool) -> None:
        if wait:
            self._await(lambda: self._answers[0] if self._answers else None, "which chunks it lacks")
        while self._answers:
            answer = self._answers.popleft()
            question = self._unanswered.pop(answer.number, None)
            if question is None or len(question) != len(answer.lacking):
                raise PeerError("the target answered a question that was not asked; start the handoff again")
            for fp, lacking in zip(question, answer.lacking, strict=True):
                data, index = self._kept.pop(fp)
                if lacking:
                    self._add(fp, data or self._store.get(fp), index)
                else:
                    self._at_target.add(fp)
                    self._shared.present(fp)
                    self.counters.chunks_at_target += 1
                    self._layer(self._layer_of(fp)).at_target += 1

    def _add(self, fp: bytes, data: bytes, index: int | None, whole: bool = False) -> None:
        """Put a chunk into the batch, in the form that takes the fewest bytes."""
        entry = wire.Entry(wire.LITERAL, 0, fp[: wire.PREFIX], data)
        if not whole:
            made = recipe.encode(data, self._shared.index, self._shared.space) if self._recipes else None
            if made is not None and len(made) < CHUNK:
                entry = wire.Entry(wire.RECIPE, 0, fp[: wire.PREFIX], made)
            entry = self._patched(entry, data, index)
        if entry.kind == wire.RECIPE:
            self.counters.chunks_recipe += 1
            self.counters.recipe_raw_bytes += len(entry.data)
        elif entry.kind == wire.PATCH:
            self.counters.chunks_patch += 1
        else:
            self.counters.chunks_sent += 1
            self.counters.sent_raw_bytes += CHUNK
        self._batched.append(fp)
        layer = self._layer_of(fp)
        self._layer(layer).chunks += 1
        self._batch_layers[layer] = self._batch_layers.get(layer, 0) + len(entry.data)
        if self._writer.add(entry):
            self._flush()

    def _layer(self, name: str) -> LayerCounters:
        return self.layers.setdefault(name, LayerCounters())

    def _patched(self, entry: wire.Entry, data: bytes, index: int | None) -> wire.Entry:
        """The patch on what the target has at that place, where that is shorter than `entry`."""
        if index is None:
            return entry
        old = self._committed[index]
        if old == ZERO or (old not in self._at_target and old not in self._sent):
            return entry
        try:
            patch = make_patch(self._store.get(old), data)
        except HaulierError:
            # The source may have dropped it; a patch is only a saving.
            return entry
        if patch is None or patch.weight >= len(entry.data):
            return entry
        return wire.Entry(wire.PATCH, index, entry.prefix, patch.data)

    def _flush(self) -> None:
        taken = self._writer.take()
        if taken is None:
            return
        message, by_kind = taken
        self.counters.recipe_bytes += by_kind[wire.RECIPE]
        self.counters.patch_bytes += by_kind[wire.PATCH]
        self.counters.sent_bytes += by_kind[wire.LITERAL]
        self._post(message)
        raw = sum(self._batch_layers.values())
        for layer, share in self._batch_layers.items():
            self._layer(layer).wire_bytes += round(len(message) * share / raw)
        self._batch_layers = {}
        # Not earlier: within a batch the target takes the entries in another order.
        for fp in self._batched:
            self._shared.present(fp)
        self._batched = []

    def _open_commit(self, new: Manifest, final: bool) -> None:
        delta = encode_delta(self._committed, self._changes)
        self._number += 1
        commit = wire.Commit(self._number, final, len(delta), new.digest)
        self._commit_answer = None
        self._commit_open = commit
        for part in wire.encode_delta_parts(delta):
            self._post(part)
        self._post(commit.encode())

    def _absorb(self, new: Manifest) -> None:
        """After an acknowledged commit: its chunks become blocks that both ends can refer to."""
        added = new_chunks(self._changes, self.committed_chunks)
        self._shared.append(added, without=self.left)
        self.committed_chunks += added
        self._at_target |= self._sent
        self._sent.clear()
        self._committed = new
        self._changes = {}

    def _answered_commit(self) -> bool | None:
        return self._commit_answer is not None or None

    def _resend(self, new: Manifest, missing: wire.Missing, resent: set[bytes]) -> None:
        ours = new.unique()
        for fp in missing.fingerprints:
            if fp not in ours:
                raise PeerError("the target asks for chunks that are not in this disk; the handoff cannot go on")
            if fp in resent:
                raise PeerError(f"the target lost chunk {fp[:6].hex()} right after it was sent whole; check its store")
            resent.add(fp)
            self._add(fp, self._store.get(fp), None, whole=True)
            self.counters.chunks_resent += 1
        self._flush()

    def _report(self, before: DiskCounters, began: float) -> RoundReport:
        self.counters.seconds += time.monotonic() - began
        return self.counters - before

    def _post(self, message: bytes) -> None:
        self._check()
        self._send_message(message)
        self.counters.wire_bytes += len(message)

    def _check_idle(self) -> None:
        self._check()
        if self._commit_open is not None:
            raise Conflict("a commit of the disk is under way; wait for it first")

    def _check(self) -> None:
        with self._cond:
            if self._error is not None:
                raise self._error

    def _await(self, get: Callable[[], T | None], what: str) -> T:
        deadline = time.monotonic() + self._patience_s
        with self._cond:
            while True:
                if self._error is not None:
                    raise self._error
                found = get()
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerError(f"the target has not answered {what} for {self._patience_s:.0f} s")
                self._cond.wait(left)


def new_chunks(changes: Mapping[int, bytes], before: Iterable[bytes]) -> list[bytes]:
    """What a commit adds to the block space: its chunks in the order of the disk, each once. The same at both ends."""
    seen = {*before, ZERO}
    return [fp for fp in dict.fromkeys(changes[index] for index in sorted(changes)) if fp not in seen]
