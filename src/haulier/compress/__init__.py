"""Owns the codecs that turn bytes into fewer bytes: one streaming zstd context and one of xz per direction.

Never touches sockets, files, clocks or threads.
"""

from haulier.compress.stream import StreamCompressor, StreamDecompressor

__all__ = ["StreamCompressor", "StreamDecompressor"]
