"""Owns QEMU's migration stream: parsing and rebuilding it, the mirror of guest memory, the page codec, the two proxies.

Takes bytes and gives bytes; touches files only by mapping them (a base, a mirror, the RAM of a guest that waits).
Never touches sockets, clocks or QEMU itself, and starts no threads.
"""

from haulier.memory.base import MemoryBase
from haulier.memory.compare import CompareReport, compare_ram
from haulier.memory.mirror import Mirror
from haulier.memory.pages import BlockFinder, BlockReader, PageDecoder, PageEncoder
from haulier.memory.proxy import SourceProxy, WireBatch
from haulier.memory.stream import Mark, Pages, Raw, StreamParser, Token, Zeros, rebuild
from haulier.memory.target_proxy import TargetProxy

__all__ = [
    "BlockFinder",
    "BlockReader",
    "CompareReport",
    "Mark",
    "MemoryBase",
    "Mirror",
    "PageDecoder",
    "PageEncoder",
    "Pages",
    "Raw",
    "SourceProxy",
    "StreamParser",
    "TargetProxy",
    "Token",
    "WireBatch",
    "Zeros",
    "compare_ram",
    "rebuild",
]
