"""What dumps of containers mostly have in common: both sites know it, so it is not sent.

`usual-dump.zst` holds the images, but for pages, of two dumps of haulier's own containers. It only makes messages
smaller: any dump can be compressed against it. Both sites need the same one; another one is another protocol.

    python -m haulier.containers.usual FOLDER... > usual-dump.zst    from directories with dumps, the least usual first
"""

from __future__ import annotations

import functools
import sys
from importlib import resources
from pathlib import Path

from haulier.compress import zstd

_LEVEL = 19


@functools.cache
def usual_dump() -> bytes:
    """The images, one after the other."""
    data = resources.files("haulier").joinpath("containers/usual-dump.zst").read_bytes()
    return bytes(zstd.decompress(data))


def make(folders: list[Path]) -> bytes:
    """The file, from dumps."""
    # Pages, numbers of this very host and what is compressed already are in no other dump.
    wanted = [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix == ".img" and not path.name.startswith(("pages-", "stats-")) and ".gz." not in path.name
    ]
    return bytes(zstd.compress(b"".join(path.read_bytes() for path in wanted), _LEVEL))


if __name__ == "__main__":
    sys.stdout.buffer.write(make([Path(word) for word in sys.argv[1:]]))
