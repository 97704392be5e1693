"""Holes in files, which Python itself cannot make."""

from __future__ import annotations

import ctypes
from typing import Final

_PUNCH: Final = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE"""
_FALLOCATE: Final = ctypes.CDLL(None, use_errno=True).fallocate
_FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, length: int) -> int:
    """Makes that part of the file a hole, in bytes; 0, or why the file system did not, as an errno."""
    return 0 if _FALLOCATE(fd, _PUNCH, offset, length) == 0 else ctypes.get_errno()
