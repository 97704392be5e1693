"""Import of disk images: raw or qcow2 files into the store. Images are hostile until proved otherwise."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK
from haulier.chunks.manifest import SECTOR, Manifest, chunks_of
from haulier.chunks.packs import disk_error
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, HaulierError, NoRoom, UnknownThing, Unsupported, UsageError
from haulier.units import CHUNK, FINGERPRINT, MAX_DISK, MIB

PREFIX: Final = "image/"
Progress = Callable[[int, int], None]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_READ: Final = 4 * MIB
_COMMIT_EVERY: Final = 128 * MIB
_QCOW2: Final = b"QFI\xfb"
_EXTERNAL_DATA: Final = 1 << 2
_TOOL_LIMIT_S: Final = 3600


def import_image(store: ChunkStore, name: str, file: Path, progress: Progress | None = None) -> Manifest:
    """Put a raw or qcow2 image into the store as manifest `image/<name>`; replaces an image of that name.

    `progress(done, total)` is told bytes of the disk. Raises UsageError for a bad name or size, UnknownThing when the
    file is not there, Unsupported for other formats, backing files and encryption, NoRoom, Corrupt. Whatever goes
    wrong, the store is as before, but for chunks that the next collection takes.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"image name {name!r}: use 1 to 64 of a-z, 0-9, - and ., a letter or digit first")
    file = Path(file)
    try:
        with open(file, "rb") as source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise UsageError(f"{file} is no regular file; give a raw or qcow2 image")
            kind, size = _inspect(file, source.fileno())
            if kind == "raw":
                return _import(store, name, file, source.fileno(), size, kind, progress)
        with tempfile.TemporaryFile(dir=store.path) as flat:
            _check_qcow2(file)
            _convert(file, flat.fileno(), size, store.path)
            return _import(store, name, file, flat.fileno(), size, kind, progress)
    except FileNotFoundError:
        raise UnknownThing(f"no image file {file}; check the path") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise disk_error(error, file) from error


def _inspect(file: Path, fd: int) -> tuple[str, int]:
    """(format, size of the disk), having refused what must not even be opened by qemu-img."""
    head = os.pread(fd, 104, 0)
    qcow2 = head[:4] == _QCOW2
    if qcow2:
        _refuse_qcow2(file, head)
    info = _qemu_img_info(file, "qcow2" if qcow2 else None)
    kind = info.get("format")
    if kind not in ("raw", "qcow2"):
        raise Unsupported(f"{file} is a {kind} image; convert it to raw or qcow2 with qemu-img convert")
    if info.get("backing-filename") or info.get("full-backing-filename"):
        raise Unsupported(f"{file} needs a backing file; flatten it with qemu-img convert")
    if info.get("encrypted"):
        raise Unsupported(f"{file} is encrypted; decrypt it with qemu-img convert")
    size = os.fstat(fd).st_size if kind == "raw" else info.get("virtual-size")
    if not isinstance(size, int) or size <= 0 or size % SECTOR:
        raise UsageError(
            f"{file} holds a disk of {size} bytes; a disk is a positive multiple of {SECTOR}: fetch it again"
        )
    if size > MAX_DISK:
        raise UsageError(f"{file} holds a disk of {size} bytes; at most {MAX_DISK} are handled")
    return kind, size


def _refuse_qcow2(file: Path, head: bytes) -> None:
    if len(head) < 72:
        raise Corrupt(f"{file} starts like qcow2 and is cut short; fetch the image again")
    _, version, backing, _, _, _, crypt = struct.unpack_from(">4sIQIIQI", head)
    if version not in (2, 3):
        raise Unsupported(f"{file} is qcow2 of version {version}; convert it with qemu-img convert")
    if backing:
        raise Unsupported(f"{file} needs a backing file; flatten it with qemu-img convert")
    if crypt:
        raise Unsupported(f"{file} is encrypted; decrypt it with qemu-img convert")
    if version == 3 and len(head) >= 80 and struct.unpack_from(">Q", head, 72)[0] & _EXTERNAL_DATA:
        raise Unsupported(f"{file} keeps its data in another file; flatten it with qemu-img convert")


def _qemu_img_info(file: Path, kind: str | None) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", *(["-f", kind] if kind else []), str(file.absolute())]
    done = _run(command)
    if done.returncode:
        raise Corrupt(f"{file} cannot be read as an image: {_last_line(done.stderr)}; fetch it again")
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def _check_qcow2(file: Path) -> None:
    """Refuse what qemu-img convert would silently fill with zeros, such as an image that was cut short."""
    done = _run(["qemu-img", "check", "-q", "-f", "qcow2", str(file.absolute())])
    if done.returncode not in (0, 3):  # 3: leaked clusters, which hurt nobody
        raise Corrupt(f"{file} is damaged or cut short: {_last_line(done.stderr)}; fetch it again")


def _convert(file: Path, fd: int, size: int, folder: Path) -> None:
    """Flatten qcow2 into the sparse file behind `fd`, which has no name: nothing is left behind when we are killed."""
    os.ftruncate(fd, size)
    target = f"/proc/self/fd/{fd}"
    command = [
        "qemu-img",
        "convert",
        "-n",
        "--target-is-zero",
        "-f",
        "qcow2",
        "-O",
        "raw",
        str(file.absolute()),
        target,
    ]
    done = _run(command, fd)
    if done.returncode:
        text = _last_line(done.stderr)
        if os.strerror(errno.ENOSPC) in text:
            raise NoRoom(f"no room left in {folder} to unpack {file}; free some space, then try again")
        raise Corrupt(f"{file} cannot be unpacked: {text}; fetch it again")


def _run(command: list[str], *fds: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TOOL_LIMIT_S, pass_fds=fds, check=False
        )
    except FileNotFoundError:
        raise HaulierError("qemu-img is not installed; install the package qemu-utils") from None
    except subprocess.TimeoutExpired:
        raise Corrupt(f"{command[0]} {command[1]} did not end within {_TOOL_LIMIT_S} s; check the image") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]


def _import(
    store: ChunkStore, name: str, file: Path, fd: int, size: int, kind: str, progress: Progress | None
) -> Manifest:
    table = bytearray(ZERO * chunks_of(size))
    uncommitted = 0
    with store.sibling() as own:  # so that a failed import holds on to nothing, however it ends
        for index, chunk in _filled_chunks(fd, size, progress):
            fp = own.put(chunk)
            table[index * FINGERPRINT : (index + 1) * FINGERPRINT] = fp
            uncommitted += CHUNK
            if uncommitted >= _COMMIT_EVERY:
                own.commit()
                uncommitted = 0
        manifest = Manifest(size, bytes(table))
        meta = {"source": file.name, "format": kind, "imported": time.time()}
        own.save_manifest(PREFIX + name, manifest, meta)
    if progress is not None:
        progress(size, size)
    return manifest


def _filled_chunks(fd: int, size: int, progress: Progress | None) -> Iterator[tuple[int, memoryview]]:
    """(index, 64 KiB) of the chunks that are not zero; holes are not read, the tail is padded."""
    buffer = bytearray(_READ)
    view = memoryview(buffer)
    for start, end in _data_ranges(fd, size):
        at = start
        while at < end:
            if progress is not None:
                progress(at, size)
            length = min(_READ, end - at)
            got = os.preadv(fd, [view[:length]], at)
            if got < min(length, size - at):
                raise Corrupt(
                    f"the image ends at {at + got} of {size} bytes; was it changed meanwhile? import it again"
                )
            buffer[got:length] = bytes(length - got)
            for offset in range(0, length, CHUNK):
                chunk = view[offset : offset + CHUNK]
                if chunk != ZERO_CHUNK:
                    yield (at + offset) // CHUNK, chunk
            at += length


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that may hold data, in whole chunks, ascending; everything where holes cannot be asked for."""
    done = 0
    while done < size:
        try:
            start = os.lseek(fd, done, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = done, size
        start = max(done, start // CHUNK * CHUNK)
        end = chunks_of(min(end, size)) * CHUNK
        if start < end:
            yield start, end
        done = max(end, done + CHUNK)
