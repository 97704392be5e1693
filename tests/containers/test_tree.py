"""The format of trees, and directories that are written out and read in as trees."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.containers import upper as rounds_of
from haulier.containers.files import region_reader, walk, write_tree
from haulier.containers.importing import import_container, import_layer
from haulier.containers.layers import chunks_of, make_layers
from haulier.containers.model import ContainerSpec
from haulier.containers.tree import Entry, Space, Tree, sequential
from haulier.containers.upper import SETTLE_NS, UpperRounds, load_signatures, mapped_for_writing, save_signatures
from haulier.errors import Corrupt, NoRoom, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK
from tests.support.waiting import wait_for

DIR = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
ROOT = Entry(b"", DIR, 0, 0, 0)


def fill(root: Path) -> None:
    """One of each kind, with contents that end within, at and beyond blocks and chunks."""
    (root / "a/b").mkdir(parents=True)
    for number, size in enumerate((0, 1, BLOCK - 1, BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5000)):
        (root / f"a/file{number}").write_bytes(os.urandom(size))
    (root / "a/b/small").write_text("hello")
    (root / "a/link").symlink_to("b/small")
    os.link(root / "a/b/small", root / "a/other")
    os.mkfifo(root / "a/pipe", 0o600)
    (root / "a/file1").chmod(0o4755)
    os.utime(root / "a/file2", ns=(1, 1_600_000_000_123_456_789))


def look(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that matters of a directory."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}
    for path, status in walk(root):
        full = os.path.join(os.fsencode(root), path)
        facts: tuple[object, ...] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode):
            facts += (Path(os.fsdecode(full)).read_bytes(), inodes.setdefault(status.st_ino, path))
        elif stat.S_ISLNK(status.st_mode):
            facts += (os.readlink(full),)
        found[path] = facts
    return found


def test_a_layer_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    fill(source)
    with ChunkStore(tmp_path / "store") as store:
        manifest = import_container(store, "app", source)
        spec = ContainerSpec(layers=(len(manifest),), command=("x",))
        (out,) = make_layers(tmp_path / "layers", store, spec, manifest)
        assert look(out) == look(source)
        assert make_layers(tmp_path / "layers", store, spec, manifest) == [out]


@pytest.mark.parametrize("when", ["another unpacks", "half made"])
def test_layers_that_are_given_up_leave_nothing(tmp_path: Path, when: str) -> None:
    source, layers = tmp_path / "source", tmp_path / "layers"
    for folder in (source, layers):
        folder.mkdir()
    fill(source)
    with ChunkStore(tmp_path / "store") as store:
        manifest = import_container(store, "app", source)
        spec = ContainerSpec(layers=(len(manifest),), command=("x",))
        calls = iter([None] * 3)

        def check() -> None:
            if next(calls, UsageError) is UsageError:
                assert when == "another unpacks" or list(layers.iterdir()), "it had begun"
                raise UsageError("enough")

        lock = os.open(layers, os.O_RDONLY)
        try:
            if when == "another unpacks":
                fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UsageError, match="enough"):
                make_layers(layers, store, spec, manifest, check=check)
            assert not list(layers.iterdir())
        finally:
            os.close(lock)
        assert len(make_layers(layers, store, spec, manifest)) == 1, "the lock is free again"


def test_a_large_file_is_the_same_chunks_wherever_it_is(tmp_path: Path) -> None:
    content = os.urandom(4 * CHUNK)
    tables = []
    with ChunkStore(tmp_path / "store") as store:
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "large").write_bytes(content)
            for extra in range(number * 30):
                (folder / f"a{extra}").write_bytes(os.urandom(5000))
            tables.append(set(import_layer(store, folder)) - {ZERO})
    assert len(tables[0] & tables[1]) == 4


def test_a_base_is_below(tmp_path: Path) -> None:
    for name in ("base", "app"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    with ChunkStore(tmp_path / "store") as store:
        base = import_container(store, "base", tmp_path / "base")
        app = import_container(store, "app", tmp_path / "app", base="base")
        meta = store.manifest_meta("image/app")
        assert meta["kind"] == "container" and meta["layers"] == [len(base), len(app) - len(base)]
        assert app.fingerprints.startswith(base.fingerprints)
        spec = ContainerSpec(layers=tuple(meta["layers"]), command=("x",))
        lower = make_layers(tmp_path / "layers", store, spec, app)
        assert [sorted(path.name for path in folder.iterdir()) for folder in lower] == [["base"], ["app"]]


def test_the_chunks_that_hold_pages_of_files(tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK)
    for name, size in (("base", len(data)), ("app", CHUNK)):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / name).write_bytes(data[:size])
    (tmp_path / "base/lib/hidden").write_bytes(data[CHUNK:])
    (tmp_path / "app/lib/hidden").write_bytes(os.urandom(2 * BLOCK))
    with ChunkStore(tmp_path / "store") as store:
        base = import_container(store, "base", tmp_path / "base")
        app = import_container(store, "app", tmp_path / "app", base="base")
        spec = ContainerSpec(layers=(len(base), len(app) - len(base)), command=("x",))

        def held(**wanted: set[int]) -> list[bytes]:
            named = {f"lib/{name}".encode(): pages for name, pages in wanted.items()}
            return [store.get(fp) for fp in chunks_of(spec, app, store, named)]

        assert held(base={BLOCKS_PER_CHUNK + 3}) == [data[CHUNK : 2 * CHUNK]]
        assert set(held(base={0, 2 * BLOCKS_PER_CHUNK})) == {data[:CHUNK], data[2 * CHUNK :]}
        assert held(app={5}) == [data[:CHUNK]]
        # Of the file that is seen, not of the one below it; nothing of what lies beyond its end, or is no file.
        (seen,) = held(hidden={0, 1})
        assert (tmp_path / "app/lib/hidden").read_bytes() in seen
        assert held(hidden={7}) == held(nothing={0}) == []


def test_a_disk_of_a_vm_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    with ChunkStore(tmp_path / "store") as store:
        store.save_manifest("image/disk", Manifest.zero(CHUNK))
        with pytest.raises(UsageError, match="disk of a VM"):
            import_container(store, "app", tmp_path / "app", base="disk")


HOSTILE = {
    "out of the tree": [ROOT, Entry(b"../x", FILE, 0, 0, 0)],
    "absolute": [ROOT, Entry(b"/etc/x", FILE, 0, 0, 0)],
    "through a link": [ROOT, Entry(b"l", stat.S_IFLNK | 0o777, 0, 0, 0, target=b"/etc"), Entry(b"l/x", FILE, 0, 0, 0)],
    "no root": [Entry(b"x", FILE, 0, 0, 0)],
    "a root that is a file": [Entry(b"", FILE, 0, 0, 0)],
    "twice": [ROOT, Entry(b"x", FILE, 0, 0, 0), Entry(b"x", FILE, 0, 0, 0)],
    "a dot": [ROOT, Entry(b".", DIR, 0, 0, 0)],
    "blocks beyond": [ROOT, Entry(b"x", FILE, 0, 0, 0, BLOCK, (100, 1))],
    "the header's block": [ROOT, Entry(b"x", FILE, 0, 0, 0, BLOCK, (0, 1))],
    "too few blocks": [ROOT, Entry(b"x", FILE, 0, 0, 0, 3 * BLOCK, (1, 2))],
    "half an extent": [ROOT, Entry(b"x", FILE, 0, 0, 0, BLOCK, (1, 1, 2))],
    "a hard link to a directory": [ROOT, Entry(b"d", DIR, 0, 0, 0), Entry(b"x", FILE, 0, 0, 0, target=b"d", hard=True)],
    "a hard link to nothing": [ROOT, Entry(b"x", FILE, 0, 0, 0, target=b"y", hard=True)],
    "an attribute of the host": [ROOT, Entry(b"x", FILE, 0, 0, 0, xattrs=((b"trusted.overlay.origin", b"x"),))],
    "no kind": [ROOT, Entry(b"x", 0o644, 0, 0, 0)],
    "a user beyond": [ROOT, Entry(b"x", FILE, 1 << 40, 0, 0)],
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE)
def test_a_table_from_elsewhere_is_not_believed(entries: list[Entry]) -> None:
    with pytest.raises(Corrupt):
        Tree.decode(msgspec.msgpack.encode(entries), 64)


def test_a_table_that_was_changed_is_noticed() -> None:
    tree = Tree((ROOT, Entry(b"x", FILE, 0, 0, 0, BLOCK, (4, 1))))
    table = tree.encode()
    region = bytearray(64 * BLOCK)
    region[:BLOCK] = tree.header(table, [(1, 1)])
    region[BLOCK : BLOCK + len(table)] = table

    def read(first: int, many: int) -> bytes:
        return bytes(region[first * BLOCK : (first + many) * BLOCK])

    assert Tree.read(read, 64) == tree
    # More than the table is as long as: the same place over and over takes memory without end.
    region[:BLOCK] = tree.header(table, [(1, 1), *([(1, 60)] * 500)])
    with pytest.raises(Corrupt, match="outside"):
        Tree.read(read, 64)
    region[:BLOCK] = tree.header(table, [(1, 1)])
    region[BLOCK + 5] ^= 1
    with pytest.raises(Corrupt):
        Tree.read(read, 64)
    assert Tree.read(lambda first, many: bytes(many * BLOCK), 64) == Tree(())


def test_places_do_not_overlap_and_large_files_begin_at_a_chunk() -> None:
    sizes = [1, 70000, 5000, 0, CHUNK, 4096, 200000]
    places, after = sequential(sizes)
    used: set[int] = {0}
    for size, (first, many) in zip(sizes, places, strict=True):
        assert many == -(-size // BLOCK)
        assert not used & set(range(first, first + many)) or not many
        used |= set(range(first, first + many))
        assert many < BLOCKS_PER_CHUNK or first % BLOCKS_PER_CHUNK == 0
    assert after > max(used) and after % BLOCKS_PER_CHUNK == 0


def test_a_space_gives_what_is_free_and_no_more() -> None:
    space = Space(64)
    one = space.find(10)
    two = space.find(40)
    assert two[0][0] % BLOCKS_PER_CHUNK == 0
    with pytest.raises(NoRoom):
        space.find(20)
    space.give(one)
    pieces = space.find(20)
    blocks = [block for first, many in pieces for block in range(first, first + many)]
    assert len(set(blocks)) == 20 and 0 not in blocks
    assert not set(blocks) & set(range(two[0][0], two[0][0] + 40))


# -- what a container writes ---------------------------------------------------------------------------------------


class Region:
    """A region in memory, and a directory that follows it, as the target's does."""

    def __init__(self, chunks: int, follower: Path) -> None:
        self.chunks = [ZERO_CHUNK] * chunks
        self.seen = list(self.chunks)
        self.follower = follower
        self.tree: Tree | None = None

    def get(self, chunk: int) -> bytes:
        return self.chunks[chunk]

    def take(self, rounds: UpperRounds, mapped: Callable[[], set[int]] = set, *, last: bool = False) -> int:
        items = list(rounds.items(mapped, last=last))
        for chunk, data in items:
            assert len(data) == CHUNK
            self.chunks[chunk] = data
        new = Tree.read(region_reader(self.get), len(self.chunks) * BLOCKS_PER_CHUNK)
        write_tree(self.follower, new, self.get, self.tree, lambda chunk: self.chunks[chunk] != self.seen[chunk])
        self.tree, self.seen = new, list(self.chunks)
        return len(items)


@pytest.fixture(autouse=True)
def settles_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_of, "SETTLE_NS", 20_000_000)


def test_a_directory_that_changes_is_followed(tmp_path: Path) -> None:
    source, follower = tmp_path / "upper", tmp_path / "follower"
    source.mkdir()
    region = Region(64, follower)
    rounds = UpperRounds(source, 64, region.get, Tree(()), {})
    region.take(rounds)
    assert look(follower) == look(source)
    fill(source)
    region.take(rounds)
    assert look(follower) == look(source)
    region.take(rounds)
    assert rounds.changed_files > 5, "what may have been written once more in the same tick is read again"
    wait_for(
        lambda: time.time_ns() > max(path.lstat().st_ctime_ns for path in source.rglob("*")) + 2 * rounds_of.SETTLE_NS,
        10,
    )
    region.take(rounds)
    assert region.take(rounds) == 0, "nothing changed, nothing goes"
    # Changed in the middle, grown, shrunk, replaced by another kind, removed, moved.
    with (source / "a/file7").open("r+b") as file:
        file.seek(CHUNK + 77)
        file.write(b"changed")
    assert region.take(rounds) <= 5
    assert look(follower) == look(source)
    with (source / "a/file6").open("ab") as file:
        file.write(os.urandom(CHUNK * 2))
    (source / "a/file5").write_bytes(b"short")
    (source / "a/link").unlink()
    (source / "a/link").mkdir()
    (source / "a/pipe").unlink()
    (source / "a/pipe").write_text("now a file")
    (source / "a/b").rename(source / "moved")
    os.mknod(source / "a/gone", stat.S_IFCHR, 0)
    os.setxattr(source / "moved", b"trusted.overlay.opaque", b"y")
    region.take(rounds)
    assert look(follower) == look(source)
    assert os.getxattr(follower / "moved", b"trusted.overlay.opaque") == b"y"
    for path in sorted(source.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    region.take(rounds, last=True)
    assert look(follower) == look(source)


def test_on_the_way_back_only_what_changed_is_read(tmp_path: Path) -> None:
    source, follower = tmp_path / "upper", tmp_path / "follower"
    source.mkdir()
    fill(source)
    region = Region(64, follower)
    region.take(UpperRounds(source, 64, region.get, Tree(()), {}))
    save_signatures(tmp_path / "signatures", follower)
    known = load_signatures(tmp_path / "signatures")
    assert region.tree is not None
    (follower / "a/file3").write_bytes(b"another")
    back = UpperRounds(follower, 64, region.get, region.tree, known)
    items = dict(back.items())
    assert back.changed_files == 1
    assert len(items) <= 3
    nothing = UpperRounds(follower, 64, region.get, region.tree, {})
    list(nothing.items())
    assert nothing.changed_files > 5, "without signatures all are read"


def test_a_change_that_keeps_size_and_time_is_found(tmp_path: Path) -> None:
    source = tmp_path / "upper"
    source.mkdir()
    (source / "file").write_bytes(b"a" * 9000)
    before = (source / "file").stat().st_mtime_ns
    region = Region(16, tmp_path / "follower")
    rounds = UpperRounds(source, 16, region.get, Tree(()), {})
    region.take(rounds)
    (source / "file").write_bytes(b"b" * 9000)
    os.utime(source / "file", ns=(before, before))
    region.take(rounds)
    assert (tmp_path / "follower/file").read_bytes() == b"b" * 9000


def settle(*paths: Path) -> None:
    """Waits until another change would have another time."""
    newest = max(path.lstat().st_ctime_ns for path in paths)
    wait_for(lambda: time.time_ns() > newest + 2 * rounds_of.SETTLE_NS, 10)


def mine() -> set[int]:
    return mapped_for_writing(lambda: [os.getpid()])


@pytest.mark.parametrize("shown", ["upper", "merged"])
def test_a_file_that_is_mapped_is_read_whatever_its_times_say(tmp_path: Path, shown: str) -> None:
    for name in ("upper", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"a" * 9000)
    region = Region(16, tmp_path / "follower")
    rounds = UpperRounds(tmp_path / "upper", 16, region.get, Tree(()), {}, tmp_path / "merged")
    settle(tmp_path / "upper/file")
    region.take(rounds)
    region.take(rounds)
    assert rounds.changed_files == 0
    inode = (tmp_path / shown / "file").stat().st_ino
    region.take(rounds, lambda: {inode})
    assert rounds.changed_files == 1
    region.take(rounds)
    assert rounds.changed_files == 1, "and once more when it is mapped no longer"
    region.take(rounds)
    assert rounds.changed_files == 0


def test_what_is_stored_through_a_mapping_before_it_ends_is_found(tmp_path: Path) -> None:
    file = tmp_path / "upper/file"
    file.parent.mkdir()
    file.write_bytes(b"a" * 9000)
    region = Region(16, tmp_path / "follower")
    rounds = UpperRounds(file.parent, 16, region.get, Tree(()), {}, file.parent)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
        mapping[0:1] = b"b"
        settle(file)
        region.take(rounds, mine)
        before = file.stat()
        mapping[1:2] = b"b"
        assert file.stat().st_ctime_ns == before.st_ctime_ns, "the page was dirty: nothing tells of this"
    region.take(rounds, mine, last=True)
    assert (tmp_path / "follower/file").read_bytes() == file.read_bytes()


def test_what_a_write_that_was_under_way_brings_after_a_round_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "upper/file"
    file.parent.mkdir()
    file.write_bytes(b"a" * 9000)
    region = Region(16, tmp_path / "follower")
    rounds = UpperRounds(file.parent, 16, region.get, Tree(()), {})
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as late:
        late[0:1] = b"b"
        # Longer ago than a tick, and not as long as a write may take.
        settle(file)
        assert SETTLE_NS >= 1_000_000_000
        monkeypatch.setattr(rounds_of, "SETTLE_NS", 30 * SETTLE_NS)
        region.take(rounds)
        # Stands for it: like a write's, its time was set as it began.
        late[1:2] = b"b"
        region.take(rounds)
        assert (tmp_path / "follower/file").read_bytes() == late[:]


@pytest.mark.root
def test_a_file_that_was_copied_up_is_known_by_what_the_overlay_calls_it(tmp_path: Path) -> None:
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for folder in (lower, upper, work, merged):
        folder.mkdir()
    (lower / "file").write_bytes(b"a" * 9000)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no overlay file system on this machine")
    region = Region(16, tmp_path / "follower")
    rounds = UpperRounds(upper, 16, region.get, Tree(()), {}, merged)
    try:
        with (merged / "file").open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
            mapping[0:1] = b"b"
            settle(upper / "file")
            region.take(rounds, mine)
            mapping[1:2] = b"b"
            region.take(rounds, mine, last=True)
            assert rounds.changed_files == 1
            assert (tmp_path / "follower/file").read_bytes() == mapping[:]
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_a_process_that_is_forked_while_mappings_are_read_is_asked_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 9000)
    gone = 1 << 30
    said = iter([[gone], [gone, os.getpid()], [gone, os.getpid()]])
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0):
        assert path.stat().st_ino in mapped_for_writing(lambda: next(said))


def test_too_much_for_the_region_says_so(tmp_path: Path) -> None:
    source = tmp_path / "upper"
    source.mkdir()
    (source / "file").write_bytes(bytes(20 * CHUNK))
    with pytest.raises(NoRoom, match="larger disk"):
        list(UpperRounds(source, 16, lambda chunk: ZERO_CHUNK, Tree(()), {}).items())
