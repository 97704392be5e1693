"""Directories and trees: reading one into a table, and writing a table out as a directory."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from haulier.containers.tree import KEPT_XATTRS, Entry, ReadBlocks, Tree, chunk_range
from haulier.errors import Corrupt, GuestError, NoRoom
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

Found = tuple[bytes, os.stat_result]
_PIECE = 4 << 20


def walk(root: Path) -> Iterator[Found]:
    """(relative path, lstat) of everything below `root`, the root itself first, parents before what is in them.

    What vanishes meanwhile is left out: the directory of a running container changes under our eyes.
    """
    top = os.fsencode(root)
    # The root itself may be reached by a link.
    yield b"", os.stat(top)
    stack = [b""]
    while stack:
        folder = stack.pop()
        try:
            with os.scandir(os.path.join(top, folder) if folder else top) as listing:
                names = sorted(listing, key=lambda item: item.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        deeper = []
        for item in names:
            path = folder + b"/" + item.name if folder else item.name
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                deeper.append(path)
        stack.extend(reversed(deeper))


def xattrs_of(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes that go with a file."""
    try:
        names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
        return tuple(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(names)
            if name.startswith(KEPT_XATTRS)
        )
    except OSError:
        return ()


def describe(root: Path, found: Iterable[Found]) -> Iterator[tuple[Entry, os.stat_result]]:
    """Entries, without contents yet; further names of one file are hard links to its first."""
    top = os.fsencode(root)
    names: dict[tuple[int, int], bytes] = {}
    for path, status in found:
        mode, full = status.st_mode, os.path.join(top, path) if path else top
        entry = Entry(path, mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        if not stat.S_ISDIR(mode) and status.st_nlink > 1:
            first = names.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                yield (
                    Entry(path, mode, status.st_uid, status.st_gid, status.st_mtime_ns, target=first, hard=True),
                    status,
                )
                continue
        target, rdev, size = b"", 0, 0
        try:
            if stat.S_ISLNK(mode):
                target = os.readlink(full)
            elif stat.S_ISREG(mode):
                size = status.st_size
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                rdev = status.st_rdev
        except OSError:
            continue
        entry = Entry(
            path, mode, status.st_uid, status.st_gid, status.st_mtime_ns, size, (), target, rdev, xattrs_of(full)
        )
        yield entry, status


def region_reader(get: Callable[[int], bytes]) -> ReadBlocks:
    """Blocks of a region whose chunks `get` gives by their number in it."""

    def read(first: int, many: int) -> bytes:
        data = b"".join(get(chunk) for chunk in chunk_range(first, many))
        start = first % BLOCKS_PER_CHUNK * BLOCK
        return data[start : start + many * BLOCK]

    return read


def write_tree(
    root: Path,
    tree: Tree,
    get: Callable[[int], bytes],
    before: Tree | None = None,
    changed: Callable[[int], bool] = lambda chunk: True,
) -> None:
    """Makes the directory `root` what `tree` says; `get` gives the region's chunks.

    With `before`, what the directory is already, only differences are written; `changed` says whether a chunk of the
    region is another than it was then. Nobody else may write there meanwhile. NoRoom when the disk is full.
    """
    try:
        _write_tree(os.fsencode(root), tree, get, before, changed)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"no room for the files of a container in {root}: free some space") from error
        raise GuestError(f"the files of a container cannot be written in {root}: {error}") from error


def _write_tree(
    top: bytes, tree: Tree, get: Callable[[int], bytes], before: Tree | None, changed: Callable[[int], bool]
) -> None:
    os.makedirs(top, exist_ok=True)
    old = {entry.path: entry for entry in before.entries} if before is not None else {}
    new = {entry.path for entry in tree.entries}
    for path in sorted(old.keys() - new, key=lambda path: -path.count(b"/")):
        _remove(os.path.join(top, path))
    folders: list[tuple[bytes, Entry]] = []
    rewritten: set[bytes] = set()
    for entry in tree.entries:
        full = os.path.join(top, entry.path) if entry.path else top
        was = old.get(entry.path)
        if (
            was is not None
            and entry.path
            and (stat.S_IFMT(was.mode), was.hard) != (stat.S_IFMT(entry.mode), entry.hard)
        ):
            _remove(full)
            was = None
        if stat.S_ISDIR(entry.mode):
            if was is None and entry.path and not os.path.isdir(full):
                os.mkdir(full)
            folders.append((full, entry))
            continue
        moved = any(changed(chunk) for first, many in entry.pairs for chunk in chunk_range(first, many))
        if was == entry and not moved and not (entry.hard and entry.target in rewritten):
            continue
        if entry.hard:
            _remove(full)
            os.link(os.path.join(top, entry.target), full, follow_symlinks=False)
            continue
        if stat.S_ISREG(entry.mode):
            if was is None:
                rewritten.add(entry.path)
            _write_file(full, entry, was, get, changed)
        else:
            rewritten.add(entry.path)
            _make(full, entry)
        _dress(full, entry)
    # Last, for what is put into a directory changes its time.
    for full, entry in reversed(folders):
        _dress(full, entry)


def _write_file(
    full: bytes, entry: Entry, was: Entry | None, get: Callable[[int], bytes], changed: Callable[[int], bool]
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    if was is None:
        _remove(full)
        flags |= os.O_EXCL
    keep = was is not None and was.extents == entry.extents
    fd = os.open(full, flags, 0o600)
    try:
        os.ftruncate(fd, entry.size if keep else 0)
        at = 0
        for first, many in entry.pairs:
            block, end = first, first + many
            while block < end:
                chunk = block // BLOCKS_PER_CHUNK
                stop = min(end, (chunk + 1) * BLOCKS_PER_CHUNK)
                size = min((stop - block) * BLOCK, entry.size - at)
                if not keep or changed(chunk):
                    start = block % BLOCKS_PER_CHUNK * BLOCK
                    data = get(chunk)[start : start + size]
                    if keep or any(data):
                        os.pwrite(fd, data, at)
                at, block = at + size, stop
        os.ftruncate(fd, entry.size)
    finally:
        os.close(fd)


def _make(full: bytes, entry: Entry) -> None:
    _remove(full)
    if stat.S_ISLNK(entry.mode):
        os.symlink(entry.target, full)
    else:
        os.mknod(full, entry.mode, entry.rdev)


def _dress(full: bytes, entry: Entry) -> None:
    """Owner, mode, attributes and time."""
    os.chown(full, entry.uid, entry.gid, follow_symlinks=False)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(full, stat.S_IMODE(entry.mode))
    wanted = dict(entry.xattrs)
    for name in {name for name, _ in xattrs_of(full)} - wanted.keys():
        os.removexattr(full, name, follow_symlinks=False)
    for name, value in wanted.items():
        os.setxattr(full, name, value, follow_symlinks=False)
    os.utime(full, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _remove(full: bytes) -> None:
    try:
        status = os.lstat(full)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(full)
    else:
        os.unlink(full)


def read_blocks(path: bytes, size: int) -> Iterator[bytes]:
    """A file's contents in whole blocks, `size` bytes rounded up: what is beyond its end by now is zeros.

    Raises FileNotFoundError if it is gone. Pieces of 4 MiB at most.
    """
    total = -(-size // BLOCK) * BLOCK
    with open(path, "rb", buffering=0, opener=_opener) as file:
        at = 0
        while at < total:
            want = min(_PIECE, total - at)
            data = os.pread(file.fileno(), want, at)
            while len(data) < want:
                more = os.pread(file.fileno(), want - len(data), at + len(data))
                if not more:
                    break
                data += more
            data = data[: max(0, size - at)]
            yield data.ljust(want, b"\0")
            at += want


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_inside(root: Path, path: bytes, offset: int, length: int) -> bytes:
    """A stretch of the file `path` below `root`; no link on the way is followed. OSError when there is none."""
    names = [name for name in path.split(b"/") if name]
    if not names or b".." in names or b"." in names:
        raise FileNotFoundError(errno.ENOENT, "which is no path")
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, name in enumerate(names):
            last = number == len(names) - 1
            flags = os.O_RDONLY | os.O_NONBLOCK if last else os.O_PATH | os.O_DIRECTORY
            deeper = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = deeper
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, "which is no plain file")
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def check_plain(path: Path) -> None:
    """Raises Corrupt unless `path` is a directory and no link to one."""
    if path.is_symlink() or not path.is_dir():
        raise Corrupt(f"{path} is no directory")


assert _PIECE % CHUNK == 0
