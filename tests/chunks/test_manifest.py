from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK, fingerprint
from haulier.chunks.manifest import Manifest, apply_delta, chunks_of, encode_delta
from haulier.compress import zstd
from haulier.errors import Corrupt, UsageError
from haulier.units import CHUNK, FINGERPRINT, MAX_DISK

FPS = [bytes([n]) * FINGERPRINT for n in range(1, 6)]
fingerprints = st.sampled_from([ZERO, *FPS]) | st.binary(min_size=FINGERPRINT, max_size=FINGERPRINT)


@st.composite
def manifests(draw: st.DrawFn, most: int = 80) -> Manifest:
    fps = draw(st.lists(fingerprints, min_size=1, max_size=most))
    short = draw(st.integers(0, CHUNK // 512 - 1)) * 512
    return Manifest(len(fps) * CHUNK - short, b"".join(fps))


def test_fingerprint_is_blake3_256() -> None:
    assert fingerprint(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert fingerprint(ZERO_CHUNK) == ZERO
    assert len(ZERO) == FINGERPRINT


def test_it_is_a_sequence_of_fingerprints() -> None:
    manifest = Manifest(2 * CHUNK + 512, FPS[0] + ZERO + FPS[1])
    assert len(manifest) == 3
    assert [manifest[i] for i in range(3)] == [FPS[0], ZERO, FPS[1]] == list(manifest.chunks()) == list(manifest)
    assert manifest.unique() == {FPS[0], FPS[1]}
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            manifest[outside]


@pytest.mark.parametrize("size", [0, -512, 511, MAX_DISK + 512])
def test_a_size_that_no_disk_has_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="multiple of 512"):
        Manifest(size, ZERO)


def test_fingerprints_must_fit_the_size() -> None:
    with pytest.raises(UsageError, match="2 chunks"):
        Manifest(CHUNK + 512, ZERO)


@given(manifests())
def test_decode_inverts_encode(manifest: Manifest) -> None:
    again = Manifest.decode(manifest.encode())
    assert again == manifest
    assert again.size == manifest.size
    assert again.digest == manifest.digest
    assert hash(again) == hash(manifest)


def test_digest_is_of_the_plain_form_and_names_the_size() -> None:
    one = Manifest(CHUNK, FPS[0])
    plain = b"haulier manifest\x01" + struct.pack("<Q", CHUNK) + FPS[0]
    assert one.digest == fingerprint(plain)
    assert one.digest != Manifest(CHUNK - 512, FPS[0]).digest
    assert one.digest != Manifest(CHUNK, FPS[1]).digest


def test_digest_does_not_depend_on_the_compressor() -> None:
    manifest = Manifest(40 * CHUNK, FPS[0] * 20 + ZERO * 20)
    data = manifest.encode()
    body = zstd.compress(zstd.decompress(data[56:]), options={zstd.CompressionParameter.checksum_flag: 1})
    assert body != data[56:]
    other = data[:20] + struct.pack("<I", len(body)) + data[24:56] + body
    assert Manifest.decode(other) == manifest


def test_zeros_cost_next_to_nothing() -> None:
    assert len(Manifest.zero(16 << 30).encode()) < 200


@given(manifests(), st.data())
@settings(max_examples=200)
def test_no_damage_goes_unseen(manifest: Manifest, data: st.DataObject) -> None:
    good = manifest.encode()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    try:
        assert Manifest.decode(bytes(bad)) == manifest  # a bit of zstd's own that says the same
    except Corrupt:
        pass


@given(manifests(), st.data())
def test_a_cut_or_longer_manifest_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    good = manifest.encode()
    with pytest.raises(Corrupt):
        Manifest.decode(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(Corrupt):
        Manifest.decode(good + b"\0")


def test_a_bomb_is_not_inflated_beyond_what_its_size_takes() -> None:
    body = zstd.compress(bytes(64 << 20))
    bomb = struct.pack("<4sB3xQII32s", b"HMAN", 1, CHUNK, 1, len(body), bytes(32)) + body
    with pytest.raises(Corrupt, match="wrong length"):
        Manifest.decode(bomb)


def test_the_callers_bound_on_the_size_holds() -> None:
    data = Manifest.zero(1 << 30).encode()
    with pytest.raises(Corrupt, match="at most 1048576"):
        Manifest.decode(data, max_size=1 << 20)


@pytest.mark.parametrize(("at", "value", "says"), [(0, b"X", "no manifest"), (4, b"\2", "version 2")])
def test_what_is_wrong_is_said(at: int, value: bytes, says: str) -> None:
    data = bytearray(Manifest.zero(CHUNK).encode())
    data[at : at + 1] = value
    with pytest.raises(Corrupt, match=says):
        Manifest.decode(bytes(data))


@given(manifests(), st.data())
def test_changed_and_replace_invert_each_other(old: Manifest, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.integers(0, len(old) - 1), fingerprints))
    new = old.replace(changes)
    assert new.changed(old) == old.changed(new) == sorted(i for i, fp in changes.items() if old[i] != fp)
    assert old.replace({i: new[i] for i in old.changed(new)}) == new


def test_disks_of_different_sizes_are_not_compared() -> None:
    with pytest.raises(UsageError):
        Manifest.zero(CHUNK).changed(Manifest.zero(2 * CHUNK))


@pytest.mark.parametrize("changes", [{-1: ZERO}, {2: ZERO}, {0: b"short"}])
def test_a_bad_change_is_refused(changes: dict[int, bytes]) -> None:
    manifest = Manifest.zero(2 * CHUNK)
    with pytest.raises(UsageError):
        manifest.replace(changes)
    with pytest.raises(UsageError):
        encode_delta(manifest, changes)


@given(manifests(), st.data())
def test_a_delta_leads_to_the_new_manifest(old: Manifest, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.integers(0, len(old) - 1), fingerprints))
    assert apply_delta(old, encode_delta(old, changes)) == old.replace(changes)


@given(manifests(), st.data())
@settings(max_examples=200)
def test_no_damage_to_a_delta_goes_unseen(old: Manifest, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.integers(0, len(old) - 1), fingerprints, min_size=1))
    good = encode_delta(old, changes)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert apply_delta(old, bytes(bad)) == old.replace(changes)
    except Corrupt:
        pass
    with pytest.raises(Corrupt):
        apply_delta(old, good[: data.draw(st.integers(0, len(good) - 1))])


def test_a_delta_is_for_one_manifest_only() -> None:
    old = Manifest.zero(4 * CHUNK)
    delta = encode_delta(old, {1: FPS[0]})
    with pytest.raises(Corrupt, match="made for manifest"):
        apply_delta(old.replace({0: FPS[1]}), delta)


@pytest.mark.parametrize("indexes", [[1, 1], [0, 9], [5]])
def test_a_delta_naming_a_chunk_twice_or_beyond_is_refused(indexes: list[int]) -> None:
    old = Manifest.zero(4 * CHUNK)
    gaps = [b - a for a, b in zip([0, *indexes], indexes, strict=False)]
    plain = struct.pack(f"<{len(gaps)}I", *gaps) + b"\0"
    body = zstd.compress(plain)
    delta = struct.pack("<4sB3xII32s32s", b"HMDL", 1, len(indexes), len(body), old.digest, old.digest) + body
    with pytest.raises(Corrupt, match="twice or beyond"):
        apply_delta(old, delta)


def test_a_small_change_of_a_large_disk_is_a_small_delta() -> None:
    old = Manifest.zero(1 << 34)
    assert len(encode_delta(old, {i: bytes([i]) * 32 for i in range(100)})) < 2000
    assert chunks_of(1 << 34) == len(old)
