"""Transfers that leave chunks behind, and chunks of the base that come from elsewhere meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from haulier.chunks.blocks import hash_pages
from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.disks import wire
from haulier.disks.heat import Heat, hot_chunks, pack, read_heat, unpack
from haulier.errors import Corrupt, HaulierError
from haulier.units import CHUNK
from tests.disks.pairs import pair
from tests.support.waiting import wait_for

SIZE = 32 * CHUNK


def pages_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(-1, 4096)


def noise() -> bytes:
    return os.urandom(CHUNK)


def test_only_hot_chunks_go_and_the_rest_is_missing_but_known(tmp_path: Path) -> None:
    base = {n: noise() for n in range(16)}
    fps = {n: fingerprint(data) for n, data in base.items()}
    meta = {"residual": {"source": "oslo"}}
    with pair(tmp_path, base, SIZE, at_target={0, 1}, partial=True, meta=meta) as both:
        both.sender.offer_manifest(hot={fps[5], fps[6]})
        # Of the first round everything stays, of a later one nothing.
        first = {20: noise(), 21: noise(), 3: noise()}
        both.sender.send_round(first.items(), leave=True)
        both.sender.commit()
        last = {22: noise(), 21: noise(), 4: base[7]}
        both.sender.send_round(last.items(), ask=False)
        both.sender.commit(final=True)
        assert both.commits[-1] == (both.sender.manifest.digest, True)
        saved = both.target.load_manifest("guest/web1")
        assert saved == both.sender.manifest
        assert both.target.manifest_meta("guest/web1") == meta
        assert not both.target.is_complete("guest/web1")
        missing = set(both.target.missing(saved.unique()))
        left = {fps[n] for n in range(16) if n not in (0, 1, 3, 4, 5, 6, 7)}
        left |= {fingerprint(first[20]), fingerprint(first[3])}
        assert missing == left
        # What changed last is there, also where it is what was left behind before.
        assert all(both.target.has(fingerprint(data)) for data in last.values())
        # The source holds all of it.
        assert both.source.missing(saved.unique()) == []
        # Memory refers to no block of what was left.
        for data, known in ((first[20], False), (last[22], True), (base[9], False), (base[5], True)):
            found = both.sender.index.lookup(hash_pages(pages_of(data)))
            assert bool((found >= 0).all()) is known
            assert known or bool((found < 0).all())
        # And it can all be brought in later.
        for fp in missing:
            both.target.put(both.source.get(fp), fp)
        both.target.save_manifest("guest/web1", saved)
        assert both.target.is_complete("guest/web1")


def test_what_changed_last_has_to_be_there(tmp_path: Path) -> None:
    base = {n: noise() for n in range(4)}
    with pair(tmp_path, base, SIZE, at_target=set(), partial=True) as both:
        both.sender.offer_manifest(hot=())
        both.sender.commit()
        lost = noise()
        take = both.receiver._store_entry
        dropped = []

        def lose_once(entry: wire.Entry) -> None:
            if not dropped:
                dropped.append(entry)
                return
            take(entry)

        both.receiver._store_entry = lose_once  # type: ignore[method-assign]
        both.sender.send_round([(9, lost)], ask=False)
        both.sender.commit(final=True)
        assert dropped
        assert both.sender.counters.chunks_resent == 1
        assert both.target.get(fingerprint(lost)) == lost


def test_a_whole_transfer_leaves_nothing(tmp_path: Path) -> None:
    base = {n: noise() for n in range(4)}
    with pair(tmp_path, base, SIZE, at_target=set()) as both:
        both.sender.offer_manifest(hot=())
        # The source made a mistake: the target does not take a disk with holes, and asks for what is missing.
        both.sender.commit(final=True)
        assert both.sender.counters.chunks_resent == 4
        both.check_equal()


def test_what_came_from_elsewhere_is_not_sent(tmp_path: Path) -> None:
    base = {n: noise() for n in range(16)}
    elsewhere: list[list[bytes]] = []
    with pair(tmp_path, base, SIZE, at_target={0}, on_lacking=elsewhere.append) as both:
        by_fp = {fingerprint(data): data for data in base.values()}
        handle = both.sender.handle

        def first_the_others(message: bytes) -> None:
            """By the time that the source learns what is lacking, half of it has come from a third site."""
            if message[0] == wire.LACKING:
                wait_for(lambda: elsewhere, 10)
                for fp in elsewhere[0][8:]:
                    both.target.put(by_fp[fp], fp, "handoff/1")
                both.receiver.came(elsewhere[0][8:])
                handle(wire.Here(list(range(9, 16))).encode())
            handle(message)

        both.back.to = first_the_others
        both.sender.offer_manifest()
        both.sender.commit(final=True)
        assert both.sender.counters.chunks_elsewhere == 7
        assert both.sender.counters.chunks_sent == 8
        both.check_equal()


@pytest.mark.parametrize("positions", [b"", b"\0" * 3, b"\xff" * 4, b"\0" * 4 * (wire.MAX_HERE + 1)])
def test_nonsense_about_elsewhere_fails_the_transfer(tmp_path: Path, positions: bytes) -> None:
    with pair(tmp_path, {0: noise()}, SIZE) as both:
        both.sender.offer_manifest()
        both.sender.handle(bytes([wire.HERE]) + positions)
        with pytest.raises(HaulierError):
            both.sender.commit()


# -- counts of reads -----------------------------------------------------------------------------------------------


def test_counts_of_reads_choose_and_order(tmp_path: Path) -> None:
    fps = [bytes([n]) * 32 for n in range(1, 9)]
    manifest = Manifest(10 * CHUNK, b"".join(fps) + ZERO * 2)
    heat = Heat(10)
    for _ in range(300):
        heat.touch(2, 3)
    for _ in range(2):
        heat.touch(5, 5)
    heat.touch(0, 9)
    assert heat.order(range(8)) == [2, 3, 5, 0, 1, 4, 6, 7]
    heat.save(tmp_path / "heat")
    counts = read_heat(tmp_path / "heat", 10)
    assert counts is not None and counts[2] == 255
    assert hot_chunks(manifest, counts) == {fps[2], fps[3], fps[5]}
    assert hot_chunks(manifest, counts, budget=CHUNK) == {fps[2]}
    assert hot_chunks(manifest, None) == hot_chunks(manifest, bytes(9)) == set()
    assert read_heat(tmp_path / "heat", 11) is None
    assert unpack(pack(counts), 10) == counts
    other = Heat(10)
    other.touch(9, 9)
    other.merge(counts)
    assert other.counts[9] == 1 and other.counts[2] == 255
    for packed, chunks in ((b"x", 10), (pack(counts), 9), (pack(bytes(1 << 20)), 10)):
        with pytest.raises(Corrupt):
            unpack(packed, chunks)
    with pytest.raises(Corrupt):
        other.merge(bytes(3))
    assert np.array_equal(other.counts[:2], [1, 1])
