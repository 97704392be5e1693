"""Services of a guest that looks at pictures, with Debian's OpenCV: python3 -m haulier.lab.vision NAME.

faces      finds faces with OpenCV's own cascade (as the published FACE workload does)
objects    knows some objects by their ORB features and finds them, turned and scaled, in pictures (as OBJECT)

Copied as it is into the guest's image, beside `services`, so nothing else of haulier. The pictures are drawn anew for
each question, so what has to be found is known. What is asked for leaves its traces as in a service that is used: the
last pictures stay in memory, each is kept as a JPEG file, and a log grows. A line asks, a line of JSON answers, at
port 7010; questions are `ping`, `look` {seed} and `stats`.
"""

from __future__ import annotations

import collections
import importlib
import socketserver
import sys
import time
from pathlib import Path
from typing import Any

from haulier.lab.services import Faces, Service

PORT = 7010
DIRECTORY = Path("/var/lib/haulier-vision")
KEPT = 400
"""Pictures that stay in memory."""
OBJECTS = 12
"""How many are known."""
FEATURES = 400
SIDE = 160
"""Of an object's picture, in pixels."""


class Looking(Service):
    """What both services have in common: a picture comes in, an answer goes out, traces stay."""

    cv2: Any

    def __init__(self) -> None:
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        self._log = (DIRECTORY / "log").open("a", buffering=1)
        self._seen: collections.deque[Any] = collections.deque(maxlen=KEPT)
        self.looked = 0

    def look(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """The picture of this seed, and what was found in it ("right" says whether that is what was drawn)."""
        raise NotImplementedError

    def ask_look(self, seed: int = 0) -> dict[str, Any]:
        began = time.monotonic()
        image, found = self.look(int(seed))
        self.looked += 1
        self._seen.append((image, found))
        self.cv2.imwrite(str(DIRECTORY / f"{self.looked % (4 * KEPT)}.jpg"), image)
        self._log.write(f"{time.time():.3f} {self.looked} {seed} {found}\n")
        return {**found, "looked": self.looked, "seconds": round(time.monotonic() - began, 3)}

    def ask_stats(self) -> dict[str, Any]:
        return {"looked": self.looked, "kept": len(self._seen)}


class SeenFaces(Looking):
    """The containers' service of the same kind, which keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self._faces = Faces()
        self.cv2 = self._faces.cv2

    def look(self, seed: int) -> tuple[Any, dict[str, Any]]:
        image = self._faces._image(seed)
        found = self._faces.cascade.detectMultiScale(image, 1.1, 3)
        return image, {"faces": [[int(n) for n in face] for face in found], "right": len(found) == 1}


class Objects(Looking):
    """Recognition by features: ORB, matching by Hamming distance, a homography by RANSAC."""

    def __init__(self) -> None:
        super().__init__()
        # Only images for this have them.
        self.cv2, self.numpy = importlib.import_module("cv2"), importlib.import_module("numpy")
        self._orb = self.cv2.ORB_create(FEATURES)
        self._matcher = self.cv2.BFMatcher(self.cv2.NORM_HAMMING)
        self._known = [self._orb.detectAndCompute(self._drawn(number), None) for number in range(OBJECTS)]

    def _drawn(self, number: int) -> Any:
        """An object: shapes of many greys, blurred a little."""
        rng, cv2 = self.numpy.random.default_rng(1000 + number), self.cv2
        image = self.numpy.full((SIDE, SIDE), 128, dtype=self.numpy.uint8)
        for _ in range(60):
            x, y, size, grey = (int(n) for n in rng.integers((0, 0, 4, 0), (SIDE, SIDE, 30, 256)))
            if rng.random() < 0.5:
                cv2.rectangle(image, (x, y), (x + size, y + size // 2 + 2), grey, -1)
            else:
                cv2.circle(image, (x, y), size // 2 + 1, grey, -1)
        return cv2.GaussianBlur(image, (3, 3), 0)

    def look(self, seed: int) -> tuple[Any, dict[str, Any]]:
        cv2, numpy = self.cv2, self.numpy
        rng, wanted = numpy.random.default_rng(seed), seed % OBJECTS
        image = rng.integers(100, 140, (240, 320), dtype=numpy.uint8)
        turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), float(rng.uniform(-40, 40)), float(rng.uniform(0.7, 1.2)))
        turn[:, 2] += (float(rng.uniform(40, 120)), float(rng.uniform(20, 60)))
        size = (320, 240)
        moved = cv2.warpAffine(self._drawn(wanted), turn, size)
        mask = cv2.warpAffine(numpy.full((SIDE, SIDE), 255, dtype=numpy.uint8), turn, size)
        image[mask > 0] = moved[mask > 0]
        points, features = self._orb.detectAndCompute(image, None)
        votes = [self._votes(known, points, features) for known in self._known]
        best = max(range(OBJECTS), key=votes.__getitem__)
        return image, {"object": best, "votes": votes[best], "right": best == wanted}

    def _votes(self, known: Any, points: Any, features: Any) -> int:
        cv2, numpy = self.cv2, self.numpy
        ours, theirs = known
        pairs = self._matcher.knnMatch(theirs, features, k=2)
        good = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < 0.75 * pair[1].distance]
        if len(good) < 6:
            return len(good)
        here = numpy.float32([ours[match.queryIdx].pt for match in good])
        there = numpy.float32([points[match.trainIdx].pt for match in good])
        _, inside = cv2.findHomography(here, there, cv2.RANSAC, 4.0)
        return 0 if inside is None else int(inside.sum())


def serve(service: Looking) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline(65536):
                self.wfile.write(service.answer(line))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    Server(("0.0.0.0", PORT), Handler).serve_forever()


def main() -> None:
    if sys.argv[1:] == ["faces"]:
        serve(SeenFaces())
    elif sys.argv[1:] == ["objects"]:
        serve(Objects())
    else:
        sys.exit(f"say which service: faces or objects, not {sys.argv[1:]}")


if __name__ == "__main__":
    main()
