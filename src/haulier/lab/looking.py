"""A guest image with Debian's OpenCV and the services of `haulier.lab.vision`, and a client of these."""

from __future__ import annotations

import contextlib
import threading
import time
from importlib import resources
from typing import Any, Final

from haulier.errors import GuestError, HaulierError
from haulier.guests.qemu import Qemu
from haulier.lab.container_clients import Talk
from haulier.lab.containers import FACE_PACKAGES
from haulier.lab.image import Application
from haulier.lab.lab import Lab
from haulier.lab.vision import PORT

NAME: Final = "vision"
DISK_BYTES: Final = 8 << 30
SERVICES: Final = ("faces", "objects")
START_S: Final = 180.0
"""Importing OpenCV takes half a minute under emulation."""


def application() -> Application:
    """What the image has more than the lab's Debian: OpenCV, its cascades, and the services, not started."""
    place = "usr/lib/haulier/vision/haulier"
    files = {
        f"{place}/__init__.py": b"",
        f"{place}/lab/__init__.py": b"",
        "usr/lib/systemd/system/haulier-vision@.service": _resource("lab/rootfs/haulier-vision@.service"),
    }
    files |= {f"{place}/lab/{name}.py": _resource(f"lab/{name}.py") for name in ("services", "vision")}
    return Application(NAME, FACE_PACKAGES, files)


def _resource(name: str) -> bytes:
    return resources.files("haulier").joinpath(name).read_bytes()


class Looker:
    """Starts one of the services in a guest and asks it from the lab's site `site`, as its users would."""

    def __init__(self, lab: Lab, site: str, host: str) -> None:
        self._lab, self._site, self._host = lab, site, host
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._seed = 0
        self.asked = 0
        self.wrong: list[str] = []
        self.lost = ""
        """Why the connection that is kept throughout was lost; empty if it was not."""

    def start(self, qemu: Qemu, service: str) -> None:
        """In the guest of `qemu`; returns when it answers. GuestError if it does not."""
        if service not in SERVICES:
            raise ValueError(service)
        with qemu.guest_agent(60) as agent:
            agent.check(["/bin/systemctl", "start", "--no-block", f"haulier-vision@{service}"], timeout=60)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, HaulierError):
                talk = Talk(self._lab, self._site, self._host, PORT)
                talk.ask("ping")
                talk.close()
                return
            if time.monotonic() > deadline:
                raise GuestError(f"service {service} of the guest at {self._host} does not answer")
            time.sleep(0.2)

    def use(self, times: int) -> float:
        """Asks so many times, one after the other; seconds an answer took in the mean."""
        talk, began = Talk(self._lab, self._site, self._host, PORT), time.monotonic()
        try:
            for _ in range(times):
                self._ask(talk)
        finally:
            talk.close()
        return (time.monotonic() - began) / max(1, times)

    def _ask(self, talk: Talk) -> None:
        self._seed += 1
        answer = talk.ask("look", seed=self._seed)
        self.asked += 1
        if not answer.get("right"):
            self.wrong.append(f"{self._seed}: {answer}")

    def go_on(self, pause_s: float) -> None:
        """Asks from now on, over one connection, with a pause after each answer, until `stop`."""
        talk = Talk(self._lab, self._site, self._host, PORT)

        def run() -> None:
            try:
                while not self._over.wait(pause_s):
                    self._ask(talk)
            except (OSError, HaulierError) as error:
                self.lost = repr(error)
            finally:
                talk.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """Ends it; what was asked, and whether all answers were right."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(30)
        return {"asked": self.asked, "wrong": len(self.wrong), "lost": self.lost}
