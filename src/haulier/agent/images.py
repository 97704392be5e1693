"""The images of this site and their golden snapshots."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import msgspec

from haulier.agent.core import Core
from haulier.agent.jobs import Job, Progress
from haulier.agent.site import check_name
from haulier.chunks.images import import_image
from haulier.chunks.store import ChunkStore
from haulier.containers.importing import import_container, is_container, looks_like_container
from haulier.containers.model import ImageConfig
from haulier.errors import Conflict, UnknownThing, UsageError
from haulier.guests.accel import probe
from haulier.guests.golden import (
    IMAGE_PREFIX,
    MANIFEST_PREFIX,
    clear_unfinished,
    find_golden,
    list_goldens,
    make_golden,
)


class ImportRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`file` is an absolute path on the agent's host: raw or qcow2, or for containers a directory, tar or OCI layout.

    With `warm` a golden snapshot of a disk is made, too. `base` names the image that a container's layer lies on.
    """

    file: str
    name: str
    warm: bool = True
    memory_mib: int = 512
    vcpus: int = 1
    kind: str = ""
    """ "vm" or "container"; "" = by what `file` is."""
    base: str = ""
    config: ImageConfig = ImageConfig()


class WarmRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    memory_mib: int = 512
    vcpus: int = 1


class Images:
    """Images are manifests `image/<name>` in the store; goldens are directories of the site."""

    def __init__(self, core: Core, store: ChunkStore) -> None:
        self.core = core
        self.site = core.site
        self.store = store

    def adopt(self) -> None:
        """At the agent's start: clears away golden snapshots that were being made."""
        clear_unfinished(self.store, self.site.run, self.site.golden, self.site.ram_dir)

    def list(self) -> list[dict[str, Any]]:
        goldens = list_goldens(self.site.golden)
        found = []
        for name in self.store.manifest_names(IMAGE_PREFIX):
            image = name.removeprefix(IMAGE_PREFIX)
            manifest = self.store.load_manifest(name)
            found.append(
                {
                    "name": image,
                    "kind": "container" if is_container(self.store.manifest_meta(name)) else "vm",
                    "size": manifest.size,
                    "chunks": len(manifest.unique()),
                    "digest": manifest.digest.hex(),
                    "golden": [
                        {
                            "id": g.id,
                            "memory_mib": g.meta.memory_mib,
                            "vcpus": g.meta.vcpus,
                            "accel": g.meta.accel,
                            "current": g.meta.image_manifest == manifest.digest.hex(),
                        }
                        for g in goldens
                        if g.meta.image == image
                    ],
                }
            )
        return found

    def add(self, request: ImportRequest) -> Job:
        """Imports an image file; Conflict if there is an image of that name."""
        check_name(request.name, "image")
        file = Path(request.file)
        if not file.is_absolute():
            raise UsageError(f"image file {request.file[:200]!r}: give an absolute path on the agent's host")
        if not file.exists():
            raise UnknownThing(f"no file or directory {request.file[:200]!r} on the agent's host: check the path")
        self._check_new(request.name)
        if request.kind == "container" or (not request.kind and looks_like_container(file)):
            return self._add_container(request, file)
        share = 0.4 if request.warm else 1.0

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(f"image {request.name}", "being imported"):
                self._check_new(request.name)
                import_image(
                    self.store,
                    request.name,
                    file,
                    progress=lambda done, total: progress(share * done / max(total, 1), "reading"),
                )
                if request.warm:
                    self._warm(
                        request.name,
                        request.memory_mib,
                        request.vcpus,
                        lambda done, what: progress(share + (1 - share) * done, what),
                    )
            return self._one(request.name)

        return self.core.jobs.start("import", request.name, work)

    def _add_container(self, request: ImportRequest, file: Path) -> Job:
        if request.base:
            self._known(request.base)

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(f"image {request.name}", "being imported"):
                self._check_new(request.name)
                import_container(
                    self.store, request.name, file, base=request.base, config=request.config, progress=progress
                )
            return self._one(request.name)

        return self.core.jobs.start("import", request.name, work)

    def _check_new(self, name: str) -> None:
        if IMAGE_PREFIX + name in self.store.manifest_names(IMAGE_PREFIX + name):
            raise Conflict(f"there is an image {name!r} already: remove it first, or choose another name")

    def warm(self, name: str, request: WarmRequest) -> Job:
        """Makes a golden snapshot, unless there is one already of the image as it is now."""
        self._known(name)
        if is_container(self.store.manifest_meta(IMAGE_PREFIX + name)):
            raise UsageError(f"image {name!r} is one of containers, which start at once: there is nothing to warm")

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(f"image {name}", "being warmed"):
                self._warm(name, request.memory_mib, request.vcpus, progress)
            return self._one(name)

        return self.core.jobs.start("warm", name, work)

    def _warm(self, name: str, memory_mib: int, vcpus: int, progress: Progress) -> None:
        digest = self.store.load_manifest(IMAGE_PREFIX + name).digest.hex()
        accel = probe()
        there = find_golden(self.site.golden, name, memory_mib, vcpus, accel=accel.kind, image_manifest=digest)
        if there is None:
            make_golden(
                self.store,
                name,
                memory_mib,
                self.site.run,
                root=self.site.golden,
                vcpus=vcpus,
                accel=accel,
                ram_dir=self.site.ram_dir,
                progress=progress,
            )

    def remove(self, name: str) -> dict[str, Any]:
        """Removes an image and its goldens. Guests made from it keep their disks; Conflict if one needs a golden."""
        self._known(name)
        with self.core.alone(f"image {name}", "being removed"):
            mine = [g for g in list_goldens(self.site.golden) if g.meta.image == name]
            users = {str(row.spec.get("golden")): row.name for row in self.core.journal.guests() if row.spec}
            for golden in mine:
                if golden.id in users:
                    raise Conflict(
                        f"guest {users[golden.id]!r} was born from a golden snapshot of image {name!r}, "
                        "which its handoffs build on: remove the guest first"
                    )
            for golden in mine:
                shutil.rmtree(golden.path, ignore_errors=True)
                with contextlib.suppress(UnknownThing):
                    self.store.drop_manifest(MANIFEST_PREFIX + golden.id)
            self.store.drop_manifest(IMAGE_PREFIX + name)
        return {"name": name, "goldens": len(mine)}

    def _known(self, name: str) -> None:
        check_name(name, "image")
        if IMAGE_PREFIX + name not in self.store.manifest_names(IMAGE_PREFIX + name):
            raise UnknownThing(f"no image {name!r} at this site: 'haulier image list' shows those there are")

    def _one(self, name: str) -> dict[str, Any]:
        return next(image for image in self.list() if image["name"] == name)
