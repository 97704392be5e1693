"""zstd from the standard library (Python 3.14), or its backport below; the same names from either."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression.zstd import *  # noqa: F403
else:
    from backports.zstd import *  # noqa: F403
