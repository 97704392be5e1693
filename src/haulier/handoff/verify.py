"""Whether what a site holds of a guest is whole: every chunk of its disk, its overlay, its picture of memory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from haulier.agent.site import Site
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, HaulierError
from haulier.handoff.custody import record_of
from haulier.handoff.journal import Journal
from haulier.handoff.ownership import MAY_RUN
from haulier.handoff.residence import adopt, adopt_container, guest_paths

Progress = Callable[[float, str], None]


def verify_guest(site: Site, journal: Journal, guest: str, progress: Progress | None = None) -> dict[str, Any]:
    """Reads all that this site keeps of `guest`. The result's `ok` says whether everything is right.

    Every chunk of its manifest is read and compared with its fingerprint; the overlay's structure is checked by
    qemu-img (a running guest's too); its QEMU is asked how it is.
    """
    row = journal.guest(guest)
    record = record_of(row)
    say = progress or (lambda share, what: None)
    problems: list[str] = []
    chunks = bad = size = elsewhere = 0
    if row.manifest:
        with ChunkStore(site.store) as store:
            manifest = store.load_manifest(row.manifest)
            size = manifest.size
            wanted = [fp for fp in dict.fromkeys(manifest.chunks()) if fp != ZERO]
            # Left behind elsewhere on purpose: known to be missing, and compared when it comes.
            if store.manifest_meta(row.manifest).get("residual") and not store.is_complete(row.manifest):
                missing = set(store.missing(wanted))
                elsewhere, wanted = len(missing), [fp for fp in wanted if fp not in missing]
            for number, fp in enumerate(wanted):
                if number % 256 == 0:
                    say(number / max(1, len(wanted)), "reading chunks")
                chunks += 1
                try:
                    store.get(fp)
                except HaulierError as error:
                    bad += 1
                    if bad <= 10:
                        problems.append(str(error))
    qemu = adopt(site, guest)
    status = "stopped"
    if qemu is not None:
        try:
            status = qemu.status()
        except HaulierError as error:
            problems.append(str(error))
            status = "does not answer"
        finally:
            qemu.close()
        if record.state not in MAY_RUN and status == "running":
            problems.append(f"guest {guest!r} runs here, but this site does not own it ({record.state.value!r})")
    container = adopt_container(site, guest)
    if container is not None:
        status = container.status()
        if record.state not in MAY_RUN and status == "running":
            problems.append(f"guest {guest!r} runs here, but this site does not own it ({record.state.value!r})")
    overlay = _check_overlay(site, guest)
    if overlay.get("problem"):
        problems.append(str(overlay["problem"]))
    say(1.0, "done")
    return {
        "guest": guest,
        "site": site.name,
        "state": record.state.value,
        "epoch": record.epoch,
        "status": status,
        "disk_bytes": size,
        "chunks": chunks,
        "chunks_bad": bad,
        "chunks_elsewhere": elsewhere,
        "overlay": overlay,
        "problems": problems,
        "ok": not problems and not bad,
    }


def _check_overlay(site: Site, guest: str) -> dict[str, Any]:
    path = guest_paths(site, guest).overlay
    if not path.exists():
        return {"present": False}
    # -U: a running guest holds the lock; what it writes meanwhile can only show as leaks, which are not errors.
    command = ["qemu-img", "check", "-U", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    found: dict[str, Any] = {"present": True}
    try:
        result = json.loads(done.stdout)
    except ValueError:
        return {**found, "problem": f"qemu-img could not check {path}: {done.stderr.strip()[-300:]}"}
    found["corruptions"] = int(result.get("corruptions", 0))
    found["leaks"] = int(result.get("leaks", 0))
    if found["corruptions"] and adopt(site, guest) is None:
        found["problem"] = f"the overlay {path} of guest {guest!r} has {found['corruptions']} corruptions"
    return found


def require_ok(result: dict[str, Any]) -> None:
    """Raises Corrupt for a result that is not ok."""
    if not result["ok"]:
        raise Corrupt(f"guest {result['guest']!r} at site {result['site']!r}: {'; '.join(result['problems'])[:2000]}")
