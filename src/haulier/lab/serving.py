"""A guest image with the services that the lab's containers have, for the same comparison with virtual machines."""

from __future__ import annotations

from importlib import resources
from typing import Final

from haulier.guests.qemu import Qemu
from haulier.lab.containers import FACE_PACKAGES, NGINX_CONF, VIDEO_BYTES
from haulier.lab.image import Application

NAME: Final = "services"
MEMORY_MIB: Final = 256
_PLACE: Final = "usr/lib/haulier/services"
_SERVE: Final = f"""\
#!/bin/sh
# The service of the lab that is named.
case "$1" in
  video) exec nginx -c /etc/nginx/lab.conf ;;
  memory) exec python3 -u /{_PLACE}/services.py memory 110 160 ;;
  *) exec python3 -u /{_PLACE}/services.py "$1" ;;
esac
"""
_UNIT: Final = f"""\
[Unit]
Description=Service of the lab: %i

[Service]
Environment=OPENCV_LOG_LEVEL=ERROR
ExecStart=/bin/sh /{_PLACE}/serve.sh %i
"""
_VIDEO: Final = (
    "import random; from pathlib import Path; Path('/srv/www').mkdir(parents=True, exist_ok=True);"
    " chosen = random.Random(3); file = open('/srv/www/video', 'wb');"
    f" [file.write(chosen.randbytes(1 << 20)) for _ in range({VIDEO_BYTES >> 20})]"
)


def application(service: str = "") -> Application:
    """What an image has more than the lab's Debian: programs and files of all services, or of one; none is started.

    Services that need nothing but Python share an image.
    """
    files = {
        f"{_PLACE}/services.py": resources.files("haulier").joinpath("lab/services.py").read_bytes(),
        f"{_PLACE}/serve.sh": _SERVE.encode(),
        "usr/lib/systemd/system/haulier-service@.service": _UNIT.encode(),
        "etc/nginx/lab.conf": NGINX_CONF.encode(),
    }
    packages: tuple[str, ...] = FACE_PACKAGES if service in ("", "faces") else ()
    commands: tuple[str, ...] = ()
    if service in ("", "video"):
        packages += ("nginx-light",)
        # nginx's own unit would serve in every guest.
        commands = ("systemctl disable nginx", f'python3 -c "{_VIDEO}"')
    name = f"{NAME}-{service if packages else 'python'}" if service else NAME
    return Application(name, packages, files, commands)


def start(qemu: Qemu, service: str) -> None:
    """Starts one of the services in the guest of `qemu`; it need not listen yet when this returns."""
    with qemu.guest_agent(60) as agent:
        # The lab's own workload listens at the services' port.
        agent.check(["/bin/systemctl", "stop", "haulier-workload"], timeout=60)
        agent.check(["/bin/systemctl", "start", "--no-block", f"haulier-service@{service}"], timeout=60)
