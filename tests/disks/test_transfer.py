"""A disk goes from one store to another: rounds, commits, and everything that can go wrong on the way."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.chunks import recipe
from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.store import ChunkStore
from haulier.disks import wire
from haulier.disks.rounds import ZEROS
from haulier.errors import Cancelled, Conflict, Corrupt, HaulierError, NoRoom, PeerError, Unsupported
from haulier.units import BLOCK, CHUNK
from tests.disks.pairs import Pair, pair

SIZE = 32 * CHUNK


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(CHUNK)


BASE = {n: noise(n) for n in range(8)}


def test_a_whole_handoff_of_a_disk(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        report = p.sender.offer_manifest()
        assert report.chunks_at_target == 8 and report.chunks_sent == report.chunks_recipe == 0
        report = p.sender.send_round([(0, noise(100)), (9, noise(101)), (1, ZEROS), (2, BASE[2]), (10, BASE[3])])
        assert (report.chunks_dirty, report.chunks_zero, report.chunks_unchanged) == (5, 1, 1)
        assert (report.chunks_sent, report.chunks_at_target) == (2, 1)
        assert report.sent_raw_bytes == 2 * CHUNK < report.sent_bytes + 2000
        p.sender.commit()
        p.check_equal()
        assert len(p.spaces[0]) == 8 + 3  # 0, 9 and the chunk that 10 took from 3
        report = p.sender.send_round([(11, noise(100)[:BLOCK] + bytes(CHUNK - BLOCK))], ask=False)
        assert report.chunks_recipe == 1, report
        assert report.wire_bytes < 200
        assert p.sender.commit(final=True) == p.receiver.manifest
        p.check_equal()
        assert [final for _, final in p.commits] == [False, True]
        assert p.receiver.wait_final(0)


def test_a_target_without_the_base_gets_it(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE, at_target={1, 5}) as p:
        report = p.sender.offer_manifest()
        assert (report.chunks_at_target, report.chunks_sent) == (2, 6)
        p.sender.commit()
        p.check_equal()
        assert p.sender.committed_chunks == []


def test_a_sibling_image_becomes_recipes(tmp_path: Path) -> None:
    """The target has other chunks made of the same blocks: only their references travel."""
    blocks = [os.urandom(BLOCK) for _ in range(64)]
    mine = {n: b"".join(blocks[16 * n : 16 * n + 16]) for n in range(4)}
    shuffled = random.Random(1).sample(blocks, 64)
    sibling = {n + 8: b"".join(shuffled[16 * n : 16 * n + 16]) for n in range(4)}
    with pair(tmp_path, mine | sibling, SIZE, at_target=set(sibling), shared=[8, 9, 10, 11, 0, 1, 2, 3]) as p:
        report = p.sender.offer_manifest()
        assert (report.chunks_recipe, report.chunks_sent) == (4, 0)
        assert report.wire_bytes < 4 * CHUNK // 50
        p.sender.commit()
        p.check_equal()
        assert p.sender.counters.chunks_resent == 0


def test_without_recipes_the_same_chunks_go_whole(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE, at_target=set()) as p:
        p.sender._recipes = False
        p.sender.offer_manifest()
        report = p.sender.send_round([(20, BASE[0][BLOCK:] + bytes(BLOCK))])
        assert (report.chunks_recipe, report.chunks_sent) == (0, 1)
        p.sender.commit()
        p.check_equal()


def test_blocks_that_the_target_lacks_are_not_referred_to(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE, at_target=set()) as p:
        report = p.sender.offer_manifest()
        assert (report.chunks_recipe, report.chunks_sent) == (0, 8)
        report = p.sender.send_round([(20, BASE[0][BLOCK:] + bytes(BLOCK))])  # sent before: now it may
        assert (report.chunks_recipe, report.chunks_sent) == (1, 0)
        p.sender.commit()
        p.check_equal()
        assert p.sender.counters.chunks_resent == 0


def test_chunks_of_one_batch_are_not_made_of_each_other(tmp_path: Path) -> None:
    """The target takes recipes before literals: a block that comes in the same batch is not there yet."""
    alike = {0: noise(0), 1: noise(0)[BLOCK:] + bytes(BLOCK), 2: noise(0)[2 * BLOCK :] + bytes(2 * BLOCK)}
    with pair(tmp_path, alike, SIZE, at_target=set()) as p:
        p.sender.offer_manifest()
        p.sender.commit()
        p.check_equal()
        assert p.sender.counters.chunks_resent == p.receiver.counters.chunks_unmade == 0


def test_a_recipe_that_makes_something_else_is_not_kept(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        writer = wire.ChunkWriter(3, 20)
        made = recipe.encode(BASE[0], p.sender.index, p.spaces[0])
        assert made is not None
        writer.add(wire.Entry(wire.RECIPE, 0, b"12345678", made[:-4] + bytes([made[-4] ^ 1]) + made[-3:]))
        taken = writer.take()
        assert taken is not None
        before = p.target.stats().chunks
        p.receiver.handle(taken[0])
        p.target.commit()
        assert p.receiver.counters.chunks_unmade == 1
        assert p.target.stats().chunks == before


def test_a_small_change_travels_as_a_patch(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE, shared=[]) as p:
        p.sender.offer_manifest()
        new = bytearray(BASE[3])
        new[100:120] = bytes(20)
        new[30000:30010] = b"0123456789"
        report = p.sender.send_round([(3, bytes(new))], ask=False)
        assert (report.chunks_patch, report.chunks_sent) == (1, 0)
        assert report.wire_bytes < 400
        p.sender.commit(final=True)
        p.check_equal()


def test_a_commit_may_be_waited_for_later(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.sender.send_round([(0, noise(50))], ask=False)
        new = p.sender.commit(final=True, wait=False)
        with pytest.raises(Conflict, match="under way"):
            p.sender.send_round([(0, noise(51))])
        with pytest.raises(Conflict, match="under way"):
            p.sender.commit()
        assert p.sender.wait_committed() == new
        p.check_equal()
        with pytest.raises(Conflict, match="no commit"):
            p.sender.wait_committed()


def test_the_target_is_asked_once_for_each_content(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.target.put(noise(77))  # the target has it from elsewhere
        report = p.sender.send_round([(n, noise(77)) for n in range(10, 20)] + [(20, noise(78)), (21, noise(78))])
        assert (report.chunks_at_target, report.chunks_sent) == (10 + 1, 1)
        p.sender.commit()
        p.check_equal()


def test_big_rounds_go_in_bounded_messages(tmp_path: Path) -> None:
    size = 1200 * CHUNK
    with pair(tmp_path, BASE, size) as p:
        items = [(n, noise(n)) for n in range(600)] + [(n, bytes([n % 256]) * CHUNK) for n in range(600, 1200)]
        p.sender.send_round(iter(items))
        p.sender.commit()
        p.check_equal()
        assert max(p.there.messages) <= wire.MAX_MESSAGE


def test_a_second_attempt_sends_only_what_is_missing(tmp_path: Path) -> None:
    """The first handoff is cut after half; chunks that arrived and were not committed are lost, the others stay."""
    new = [(n, noise(200 + n)) for n in range(10)]
    with pair(tmp_path, BASE, SIZE) as p:
        p.sender.offer_manifest()
        p.sender.send_round(new[:5])
        p.sender.commit()
        p.sender.fail(Cancelled("cancelled"))
        with pytest.raises(Cancelled):
            p.sender.send_round(new)
        p.target.drop_lease("handoff/1")
    with pair(tmp_path, BASE, SIZE) as p:
        p.sender.offer_manifest()
        report = p.sender.send_round(new)
        assert (report.chunks_at_target, report.chunks_sent) == (5, 5)
        p.sender.commit(final=True)
        p.check_equal()


ROUND = st.lists(
    st.tuples(
        st.integers(0, 11),
        st.one_of(
            st.just(ZEROS),
            st.integers(0, 6).map(noise),
            st.tuples(st.integers(0, 6), st.integers(0, 15), st.integers(0, 255)).map(
                lambda t: noise(t[0])[: t[1] * BLOCK] + bytes([t[2]]) * BLOCK + noise(t[0])[(t[1] + 1) * BLOCK :]
            ),
        ),
    ),
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(
    rounds=st.lists(st.tuples(ROUND, st.booleans(), st.booleans()), min_size=1, max_size=4),
    at_target=st.sets(st.integers(0, 7)),
    offer=st.booleans(),
)
def test_any_rounds_end_with_equal_disks(
    rounds: list[tuple[list[tuple[int, bytes]], bool, bool]], at_target: set[int], offer: bool
) -> None:
    with TemporaryDirectory(prefix="disks-") as root:
        with pair(Path(root), BASE, 12 * CHUNK, at_target=at_target) as p:
            disk = {n: BASE.get(n, ZEROS) for n in range(12)}
            if offer:
                p.sender.offer_manifest()
            for items, ask, commit in rounds:
                p.sender.send_round(items, ask=ask)
                disk.update(items)
                if commit:
                    p.sender.commit()
                    p.check_equal()
            p.sender.commit(final=True)
            p.check_equal()
            for n in range(12):
                assert p.target.get(p.receiver.manifest[n]) == disk[n]
            assert p.there.errors == p.back.errors == []


# -- damage at the target


def test_a_chunk_that_went_bad_at_the_target_is_sent_again(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.sender.offer_manifest()
        p.sender.commit()
    (pack,) = (tmp_path / "target" / "packs").glob("*.pack")
    raw = bytearray(pack.read_bytes())
    at = raw.index(BASE[4][:100])
    with pack.open("r+b") as file:
        file.seek(at + 5000)
        file.write(b"damaged!")
    with pair(tmp_path, BASE, SIZE, at_target=set()) as p:
        p.sender.offer_manifest()
        # Recipe and patch both are made on chunk 4, which the target thinks it has.
        p.sender.send_round([(20, BASE[4][BLOCK:] + BASE[5][:BLOCK])], ask=False)
        p.sender.commit(final=True)
        assert p.receiver.counters.chunks_unmade == 1
        assert p.sender.counters.chunks_resent >= 1
        p.check_equal()


@pytest.mark.parametrize("changed", [(20, BASE[4][BLOCK:] + BASE[5][:BLOCK]), (4, b"news" + BASE[4][4:])])
def test_a_base_chunk_lost_after_the_first_commit_is_sent_again_at_the_last(
    tmp_path: Path, changed: tuple[int, bytes]
) -> None:
    """Met as bad while a recipe or a patch is made of it: the last commit answers for it as well."""
    with pair(tmp_path, BASE | {21: BASE[4]}, SIZE) as p:
        p.sender.offer_manifest()
        p.sender.commit()
        with p.target.index.read() as db:
            number, at = db.execute("SELECT pack, offset FROM chunks WHERE fp=?", (p.base[4],)).fetchone()
        p.target.places.forget()  # as if nobody had read it since the agent started
        with (p.target.packs / f"{number:08d}.pack").open("r+b") as file:
            file.seek(at + 5000)
            file.write(b"damaged!")
        p.sender.send_round([changed], ask=False)
        p.sender.commit(final=True)
        assert p.receiver.counters.chunks_unmade == 1
        assert p.target.is_complete("guest/web1")
        p.check_equal()


def test_chunks_lost_between_question_and_commit_are_sent_again(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.sender.offer_manifest()
        (lost,) = [BASE[3]]
        fp = p.base[3]
        with p.target.index.write() as db:
            db.execute("DELETE FROM chunks WHERE fp=?", (fp,))
        p.sender.commit()
        assert p.sender.counters.chunks_resent == 1
        assert p.target.get(fp) == lost
        p.check_equal()


# -- a target that cannot go on


class FullStore(ChunkStore):
    full = False

    def put(self, data: bytes | bytearray | memoryview, fp: bytes | None = None, lease: str = "") -> bytes:
        if self.full:
            raise NoRoom("no room left for the chunk store")
        return super().put(data, fp, lease)


def test_a_full_target_is_a_clear_failure_at_the_source(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        store = FullStore(tmp_path / "target")
        p.receiver._store = store
        p.sender.offer_manifest()
        store.full = True
        with pytest.raises(NoRoom, match="at the target: no room"):
            p.sender.send_round([(9, noise(9))], ask=False)
            p.sender.commit()
        with pytest.raises(NoRoom):
            p.receiver.wait_final(20)
        with pytest.raises(NoRoom):
            p.sender.send_round([(10, noise(10))])
        assert isinstance(p.receiver.error, NoRoom)
        assert p.receiver.manifest == p.base
        assert p.commits == []
        store.close()


@pytest.mark.root
def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "disks-test", tmp_path / "target"], check=True)
    try:
        with pair(tmp_path, BASE, 600 * CHUNK) as p:
            p.sender.offer_manifest()
            p.sender.send_round([(9, noise(9))])
            p.sender.commit()
            before = p.receiver.manifest
            with pytest.raises(NoRoom, match="gc"):
                p.sender.send_round([(n, noise(n)) for n in range(10, 600)], ask=False)
                p.sender.commit(final=True)
            assert p.receiver.manifest == p.target.load_manifest("guest/web1") == before
            assert not p.receiver.final and len(p.commits) == 1
            for fp in before.unique():
                p.target.get(fp)
            assert p.source.has(fingerprint(noise(10)))  # the source threw nothing away
    finally:
        subprocess.run(["umount", "-l", tmp_path / "target"], check=True)


def test_an_oserror_without_space_is_no_room(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:

        def full(*args: object) -> bytes:
            raise OSError(28, "No space left on device")

        p.target.put = full  # type: ignore[method-assign, assignment]
        p.sender.send_round([(9, noise(9))], ask=False)
        with pytest.raises(NoRoom, match="gc"):
            p.sender.commit()
        del p.target.put


def test_a_failing_on_commit_ends_it(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:

        def refuse(manifest: object, final: bool) -> None:
            raise Conflict("the export is gone")

        p.receiver._on_commit = refuse
        with pytest.raises(Conflict, match="at the target: the export is gone"):
            p.sender.commit(final=True)
        assert not p.receiver.final


# -- hostile or confused peers


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x63",
        b"\x01",
        bytes([wire.CHUNKS]) + os.urandom(100),
        wire.Offer(1 << 40, 0, bytes(32)).encode(),
        wire._ASK.pack(wire.ASK, 1, 5000) + bytes(5000 * 32),
        wire.Commit(1, False, 0, bytes(32)).encode(),
        wire.Commit(1, True, 99, bytes(32)).encode(),
        bytes([wire.DELTA]) + bytes(500_000),
        bytes(wire.MAX_MESSAGE + 1),
    ],
)
def test_nonsense_ends_the_transfer_and_nothing_is_kept(tmp_path: Path, message: bytes) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        told: list[bytes] = []
        p.receiver._send = told.append
        with pytest.raises((Corrupt, Conflict)) as raised:
            p.receiver.handle(message)
        failed = wire.Failed.decode(told[-1])
        assert failed.code == raised.value.exit_code
        p.receiver.handle(wire.Offer(p.base.size, len(p.spaces[1]), p.base.digest).encode())
        assert len(told) == 1
        assert p.target.manifest_names() == []
        assert p.commits == []


def test_a_literal_with_another_fingerprint_is_refused(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.receiver._send = lambda message: None
        writer = wire.ChunkWriter(3, 20)
        writer.add(wire.Entry(wire.LITERAL, 0, b"12345678", noise(9)))
        taken = writer.take()
        assert taken is not None
        before = p.target.stats().chunks
        with pytest.raises(Corrupt, match="other contents"):
            p.receiver.handle(taken[0])
        p.target.commit()
        assert p.target.stats().chunks == before


def test_a_manifest_with_chunks_that_never_come_is_not_committed(tmp_path: Path) -> None:
    """A source that never sends what it promised: it is asked for it, and nothing is committed."""
    with pair(tmp_path, BASE, SIZE) as p:
        told: list[bytes] = []
        p.receiver._send = told.append
        from haulier.chunks.manifest import encode_delta

        delta = encode_delta(p.base, {0: os.urandom(32)})
        for _ in range(3):
            p.receiver.handle(bytes([wire.DELTA]) + delta)
            new = p.base  # the digest is checked by the delta itself
            digest = delta[-len(delta) :][16 + 32 : 16 + 64]
            p.receiver.handle(wire.Commit(1, True, len(delta), digest).encode())
            assert told[-1][0] == wire.MISSING
        assert p.receiver.manifest == new and p.commits == []
        assert p.target.manifest_names() == []


@pytest.mark.parametrize(
    "message",
    [b"", b"\x05", b"\x81junk", wire.Answer(77, [True]).encode(), wire.Lacking([True], []).encode(),
     wire.Committed(9, bytes(32)).encode(), wire.Missing(2, [bytes(32)]).encode()],
)  # fmt: skip
def test_a_confused_target_fails_the_handoff_at_the_source(tmp_path: Path, message: bytes) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.there.to = lambda asked: p.sender.handle(message)
        p.sender._patience_s = 2  # some of these are no answer at all
        with pytest.raises((PeerError, Corrupt)):
            p.sender.offer_manifest()
            p.sender.send_round([(0, noise(99))])
            p.sender.commit()


def test_a_target_that_asks_for_foreign_chunks_gets_none(tmp_path: Path) -> None:
    secret = noise(4711)
    with pair(tmp_path, BASE, SIZE) as p:
        fp = p.source.put(secret)
        p.there.to = lambda asked: asked[0] == wire.COMMIT and p.sender.handle(wire.Missing(1, [fp]).encode())
        with pytest.raises(PeerError, match="not in this disk"):
            p.sender.commit()


def test_a_target_that_always_misses_the_same_is_given_up(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.there.to = lambda asked: asked[0] == wire.COMMIT and p.sender.handle(wire.Missing(1, [p.base[0]]).encode())
        with pytest.raises(PeerError, match="lost chunk"):
            p.sender.commit()


def test_silence_is_an_error_in_the_end(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.there.to = lambda asked: None
        p.sender._patience_s = 0.05
        with pytest.raises(PeerError, match="not answered"):
            p.sender.offer_manifest()


def test_fail_wakes_whoever_waits(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        reached = threading.Event()
        p.there.to = lambda asked: reached.set()
        raised: list[HaulierError] = []

        def offer() -> None:
            try:
                p.sender.offer_manifest()
            except HaulierError as error:
                raised.append(error)

        thread = threading.Thread(target=offer)
        thread.start()
        assert reached.wait(20)
        p.sender.fail(Cancelled("the operator cancelled"))
        thread.join(20)
        assert [type(e) for e in raised] == [Cancelled]


def test_different_starts_are_told_apart(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.spaces[1].append([p.base[0]])
        with pytest.raises(Conflict, match="block space"):
            p.sender.offer_manifest()
    with pair(tmp_path, BASE, SIZE) as p:
        p.receiver._manifest = p.base.replace({0: p.base[1]})
        with pytest.raises(Conflict, match="starts from manifest"):
            p.sender.offer_manifest()


def test_another_version_says_so(tmp_path: Path) -> None:
    with pair(tmp_path, BASE, SIZE) as p:
        p.there.tap = lambda message: message[:1] + b"\x09" + message[2:] if message[0] == wire.OFFER else message
        with pytest.raises(Unsupported, match="update"):
            p.sender.offer_manifest()


def test_an_iterator_that_fails_leaves_the_disk_as_committed(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[int, bytes]]:
        yield 0, noise(1)
        raise PeerError("QEMU went away")

    with pair(tmp_path, BASE, SIZE) as p:
        with pytest.raises(PeerError, match="QEMU"):
            p.sender.send_round(broken())
        assert p.sender.committed == p.base
        assert isinstance(p, Pair)
