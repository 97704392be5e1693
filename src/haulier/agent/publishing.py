"""Bringing the chunks of an image to the object store that the site's settings name, where every site finds them."""

from __future__ import annotations

from typing import Any

from haulier.agent.core import Core
from haulier.agent.jobs import Job, Progress
from haulier.agent.site import check_name
from haulier.chunks.images import PREFIX
from haulier.chunks.store import ChunkStore
from haulier.errors import UsageError
from haulier.fetch.origin import upload

BATCH = 512


def publish(core: Core, store: ChunkStore, image: str) -> Job:
    """Uploads what the object store lacks of an image; the job's result counts chunks and bytes.

    UsageError where the site has no object store, UnknownThing for an image that is not here.
    """
    site = core.site
    if not site.origin:
        raise UsageError(f"site {site.name!r} has no object store: set 'origin' in its site.toml (docs/sources.md)")
    manifest = store.load_manifest(PREFIX + check_name(image, "image"))

    def work(progress: Progress) -> dict[str, Any]:
        wanted = sorted(manifest.unique())
        chunks = total = 0
        for at in range(0, len(wanted), BATCH):
            progress(at / len(wanted), f"{at} of {len(wanted)} chunks")
            sent, bytes_ = upload(store, wanted[at : at + BATCH], site.origin, site.origin_endpoint)
            chunks, total = chunks + sent, total + bytes_
        return {"name": image, "chunks": len(wanted), "sent_chunks": chunks, "sent_bytes": total}

    return core.jobs.start("publish", image, work)
