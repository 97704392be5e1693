"""`haulier agent`: the daemon of this site."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from haulier.agent.site import default_root
from haulier.cli.common import Root
from haulier.units import MIB

LOG_BYTES: Final = 20 * MIB
LOG_FILES: Final = 3
"""The one that is written, and the two before it."""


def agent(*, root: Root = None) -> None:
    """Run the daemon of this site, in the foreground, until SIGTERM. Guests go on after it."""
    from haulier.agent import server
    from haulier.agent.site import Site

    where = root or default_root()
    site = Site.load(where)
    set_up_log(site.root / "agent.log")
    server.run(where)


def set_up_log(path: Path) -> None:
    """A daemon's log goes to `path`, of LOG_BYTES at most, and to stderr; what was before it is `path`.1 and .2."""
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    file = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1)
    handlers: list[logging.Handler] = [file]
    if not os.path.samestat(path.stat(), os.fstat(sys.stderr.fileno())):
        # otherwise the caller has sent stderr to that file, and each line would stand in it twice
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(form)
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    # every QMP command at INFO would bury what matters
    logging.getLogger("qemu").setLevel(logging.WARNING)
