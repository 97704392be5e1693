"""A handoff's source worker that compares both memories, page by page, before the token; run inside a lab's site.

python -m tests.system.comparing ROOT GUEST TARGET OTHER_RAM: prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from haulier.agent.site import Site
from haulier.handoff.journal import HandoffRow, Journal, new_handoff_id
from haulier.handoff.messages import Job
from haulier.handoff.vm_source import VmSource
from haulier.handoff.worker import peer_of
from haulier.memory.compare import compare_ram
from haulier.process import ProcessId


class Comparing(VmSource):
    other: Path
    found: dict[str, Any]

    def _before_token(self) -> None:
        report = compare_ram(self.paths.ram, self.other)
        self.found = {
            "pages": report.pages,
            "differing": report.differing[:50],
            "status": self.qemu.status(),
            "bytes": os.stat(self.paths.ram).st_blocks * 512,
        }


def main() -> None:
    root, guest, target, other = sys.argv[1:]
    site = Site.load(root)
    with Journal(site.journal) as journal:
        job = Job(handoff=new_handoff_id(), role="source", guest=guest, peer=target)
        journal.add_handoff(HandoffRow(id=job.handoff, guest=guest, role="source", peer=target))
        journal.set_worker(job.handoff, ProcessId.this())
        site.handoff_root(job.handoff).mkdir(mode=0o700)
        handoff = Comparing(site, journal, job, peer_of(site, journal, target), threading.Event())
        handoff.other = Path(other)
        report = handoff.run()
        journal.end_handoff(job.handoff, "done", phase="done")
    print(json.dumps({"compared": handoff.found, "report": report}))


if __name__ == "__main__":
    main()
