"""Services for containers of the lab, each a plain program: python3 services.py NAME [ARGUMENTS].

Copied as it is into the containers' images, so nothing but the standard library (and, for faces, Debian's OpenCV).
Each listens on port 7000; a line asks, a line of JSON answers.

game     ticks 20 times a second; TCP clients get each tick, UDP clients an answer with the tick's number
memory   holds MIB of random bytes, rewrites a byte in RATE pages a second, knows what each page must be
faces    looks for faces in an image that it makes anew for each question
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any

PORT = 7000
PAGE = 4096


class Service:
    """Answers questions; subclasses have the methods `ask_*`."""

    def ask_ping(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "time": time.time()}

    def answer(self, line: bytes) -> bytes:
        try:
            request = json.loads(line)
            found = getattr(self, "ask_" + str(request.pop("cmd")))(**request)
            return json.dumps({"ok": True, **found}).encode() + b"\n"
        except Exception as error:
            return json.dumps({"ok": False, "error": repr(error)}).encode() + b"\n"

    def serve(self) -> None:
        service = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while line := self.rfile.readline(65536):
                    self.wfile.write(service.answer(line))

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        Server(("0.0.0.0", PORT), Handler).serve_forever()


class Game(Service):
    """A world that changes 20 times a second, and players who are told of it."""

    def __init__(self) -> None:
        self.tick = 0
        self.world = bytearray(random.Random(1).randbytes(2 << 20))
        self.players: list[socket.socket] = []
        self.log = Path("/var/log/game.log").open("a", buffering=1)  # noqa: SIM115
        threading.Thread(target=self._run, daemon=True).start()
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._udp, daemon=True).start()

    def ask_state(self) -> dict[str, Any]:
        return {"tick": self.tick, "players": len(self.players)}

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.tick += 1
            at = self.tick * 37 % (len(self.world) // PAGE) * PAGE
            self.world[at : at + 8] = self.tick.to_bytes(8, "little")
            if self.tick % 20 == 0:
                self.log.write(f"{self.tick}\n")
            line = json.dumps({"tick": self.tick, "sent": time.time()}).encode() + b"\n"
            for player in list(self.players):
                try:
                    player.send(line)
                except OSError:
                    self.players.remove(player)
            due += 0.05
            now = time.monotonic()
            if due < now - 0.5:
                due = now
            time.sleep(max(0.0, due - now))

    def _accept(self) -> None:
        listener = socket.create_server(("0.0.0.0", PORT + 1))
        while True:
            player, _ = listener.accept()
            player.setblocking(False)
            self.players.append(player)

    def _udp(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", PORT + 2))
        while True:
            data, where = sock.recvfrom(2048)
            sock.sendto(json.dumps({"tick": self.tick, "echo": data.decode()}).encode(), where)


class Memory(Service):
    """Random pages of which some change all the time; each page's number of changes tells what must be in it."""

    def __init__(self, mib: int, rate: int) -> None:
        self.count = mib * 256
        self.data = bytearray()
        for page in range(self.count):
            self.data += random.Random(page).randbytes(PAGE)
        self.changes = [0] * self.count
        self.lock = threading.Lock()
        self.written = 0
        threading.Thread(target=self._run, args=(rate,), daemon=True).start()

    def _run(self, rate: int) -> None:
        chosen = random.Random(7)
        while True:
            with self.lock:
                for _ in range(max(1, rate // 50)):
                    page = chosen.randrange(self.count)
                    self.changes[page] += 1
                    at = page * PAGE
                    self.data[at : at + 4] = self.changes[page].to_bytes(4, "little")
                    self.written += 1
            time.sleep(0.02)

    def ask_state(self) -> dict[str, Any]:
        return {"pages": self.count, "written": self.written}

    def ask_check(self) -> dict[str, Any]:
        bad = 0
        for page in range(self.count):
            with self.lock:
                mine = bytes(self.data[page * PAGE : (page + 1) * PAGE])
                changes = self.changes[page]
            wanted = random.Random(page).randbytes(PAGE)
            if changes:
                wanted = changes.to_bytes(4, "little") + wanted[4:]
            bad += mine != wanted
        return {"pages": self.count, "bad": bad, "written": self.written}


class Faces(Service):
    """Debian's OpenCV with its own cascade; the image is drawn, so what has to be found in it is known."""

    def __init__(self) -> None:
        # Only this service needs them, and only its image has them.
        self.cv2: Any = importlib.import_module("cv2")
        self.numpy: Any = importlib.import_module("numpy")
        names = ["/usr/share/opencv4/haarcascades", "/usr/share/opencv/haarcascades"]
        folder = next(name for name in names if Path(name).is_dir())
        self.cascade = self.cv2.CascadeClassifier(folder + "/haarcascade_frontalface_default.xml")
        self.answered = 0

    def _image(self, seed: int) -> Any:
        cv2, numpy = self.cv2, self.numpy
        image = numpy.random.default_rng(seed).integers(90, 110, (240, 320), dtype=numpy.uint8)
        cv2.ellipse(image, (160, 120), (50, 66), 0, 0, 360, 200, -1)
        for x in (140, 180):
            cv2.ellipse(image, (x, 105), (11, 6), 0, 0, 360, 60, -1)
            cv2.ellipse(image, (x, 90), (14, 4), 0, 0, 360, 80, -1)
        cv2.ellipse(image, (160, 125), (6, 14), 0, 0, 360, 150, -1)
        cv2.ellipse(image, (160, 155), (22, 7), 0, 0, 360, 90, -1)
        return cv2.GaussianBlur(image, (7, 7), 0)

    def ask_detect(self, seed: int = 0) -> dict[str, Any]:
        image = self._image(seed)
        found = self.cascade.detectMultiScale(image, 1.1, 3)
        self.answered += 1
        digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
        return {"faces": [[int(n) for n in face] for face in found], "image": digest, "answered": self.answered}


def main() -> None:
    name, *rest = sys.argv[1:]
    if name == "game":
        Game().serve()
    elif name == "memory":
        Memory(int(rest[0]), int(rest[1])).serve()
    elif name == "faces":
        Faces().serve()
    else:
        sys.exit(f"no service {name}")


if __name__ == "__main__":
    main()
