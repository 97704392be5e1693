"""`haulier agent`: the daemon of this site."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from haulier.agent.site import default_root
from haulier.cli.common import Root


def agent(*, root: Root = None) -> None:
    """Run the daemon of this site, in the foreground, until SIGTERM. Guests go on after it."""
    from haulier.agent import server
    from haulier.agent.site import Site

    where = root or default_root()
    site = Site.load(where)
    set_up_log(site.root / "agent.log")
    server.run(where)


def set_up_log(path: Path) -> None:
    """A daemon's log goes to `path` and to stderr."""
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    file = logging.FileHandler(path)
    handlers: list[logging.Handler] = [file]
    if not os.path.samestat(path.stat(), os.fstat(sys.stderr.fileno())):
        # otherwise the caller has sent stderr to that file, and each line would stand in it twice
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(form)
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    # every QMP command at INFO would bury what matters
    logging.getLogger("qemu").setLevel(logging.WARNING)
