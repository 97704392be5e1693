"""Services of a guest that looks at pictures, with Debian's OpenCV: python3 -m haulier.lab.vision NAME.

faces      finds faces with OpenCV's own cascade (as the published FACE workload does)
objects    knows some objects by their ORB features and finds them, turned and scaled, in pictures (as OBJECT)

Copied as it is into the guest's image, beside `services`, so nothing else of haulier. The pictures are drawn anew for
each question, so what has to be found is known; they have what photographs have: the larger the structure, the
stronger it is, and a sensor's noise. What is asked for leaves its traces as in a service that is used: answers stay in
memory and in a log, each picture is kept as a JPEG file, and the picture itself is let go once it is answered, which
leaves its contents in the program's free memory. A line asks, a line of JSON answers, at port 7010; questions are
`ping`, `look` {seed} and `stats`.
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
"""Answers that stay in memory."""
FILES = 1600
"""Pictures that stay on disk."""
QUALITY = 85
"""Of these, as cameras have it."""
HEIGHT, WIDTH = 240, 320
CONTRAST = 22.0
"""Standard deviation of a scene, in grey levels."""
NOISE = 2.0
"""The same of a sensor's noise."""
OBJECTS = 12
"""How many are known."""
FEATURES = 400
SIDE = 160
"""Of an object's picture, in pixels."""


class Camera:
    """Takes pictures of scenes that nobody has seen: greys whose amplitude falls with frequency, as in photographs.

    Few buffers, used again and again: what the drawing leaves behind must be little beside what the looking leaves.
    """

    def __init__(self, cv2: Any, numpy: Any) -> None:
        self._cv2, self._numpy = cv2, numpy
        self._octave = numpy.empty((HEIGHT, WIDTH), numpy.int16)
        self._light = numpy.empty((HEIGHT, WIDTH), numpy.int16)
        # An amplitude that falls as 1/f is as much variance in each octave. A cubic between random points has four
        # fifths of theirs. In sixteenths of a grey level.
        self._octaves = [4 << step for step in range(7)]
        self._strength = 16 * CONTRAST / (0.78 * len(self._octaves)) ** 0.5

    def scene(self, seed: int) -> Any:
        """A scene with nothing to find, int16 (HEIGHT, WIDTH), in sixteenths of a grey level; good until the next."""
        cv2, numpy, light = self._cv2, self._numpy, self._light
        rng = numpy.random.default_rng(seed)
        light[:] = 16 * 128
        for across in self._octaves:
            points = rng.standard_normal((across * HEIGHT // WIDTH, across), dtype=numpy.float32)
            points *= self._strength
            cv2.resize(points.astype(numpy.int16), (WIDTH, HEIGHT), dst=self._octave, interpolation=cv2.INTER_CUBIC)
            light += self._octave
        return light

    def shot(self, seed: int) -> Any:
        """The picture that the camera takes of the scene, u8 (HEIGHT, WIDTH)."""
        cv2, numpy, light = self._cv2, self._numpy, self._light
        cv2.GaussianBlur(light, (3, 3), 0, dst=light)  # no lens is sharper
        cv2.setRNGSeed(seed & 0x7FFFFFFF)
        cv2.randn(self._octave, 0, 16 * NOISE)
        light += self._octave
        light += 8
        light >>= 4
        return numpy.clip(light, 0, 255).astype(numpy.uint8)


class Looking(Service):
    """What both services have in common: a picture comes in, an answer goes out, traces stay."""

    def __init__(self, cv2: Any, numpy: Any) -> None:
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        self.cv2, self.numpy = cv2, numpy
        self.camera = Camera(cv2, numpy)
        self._log = (DIRECTORY / "log").open("a", buffering=1)
        self._answers: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)
        self.looked = 0

    def look(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """The picture of this seed, and what was found in it ("right" says whether that is what was drawn)."""
        raise NotImplementedError

    def ask_look(self, seed: int = 0) -> dict[str, Any]:
        began = time.monotonic()
        image, found = self.look(int(seed))
        self.looked += 1
        self._answers.append(found)
        quality = [self.cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        self.cv2.imwrite(str(DIRECTORY / f"{self.looked % FILES}.jpg"), image, quality)
        self._log.write(f"{time.time():.3f} {self.looked} {seed} {found}\n")
        return {**found, "looked": self.looked, "seconds": round(time.monotonic() - began, 3)}

    def ask_stats(self) -> dict[str, Any]:
        return {"looked": self.looked, "kept": len(self._answers)}


class SeenFaces(Looking):
    """A face in a scene, and the containers' service's cascade to find it."""

    def __init__(self) -> None:
        faces = Faces()
        super().__init__(faces.cv2, faces.numpy)
        self._cascade = faces.cascade

    def look(self, seed: int) -> tuple[Any, dict[str, Any]]:
        scene = self.camera.scene(seed)
        self._draw(scene)
        image = self.camera.shot(seed)
        found = self._cascade.detectMultiScale(image, 1.1, 3)
        faces = [[int(n) for n in face] for face in found]
        return image, {"faces": faces, "right": any(self._is_it(*face) for face in faces)}

    def _draw(self, scene: Any) -> None:
        """In its middle, as `services.Faces` draws it."""
        cv2 = self.cv2
        for center, axes, grey in (
            ((160, 120), (50, 66), 200),
            ((140, 105), (11, 6), 60),
            ((180, 105), (11, 6), 60),
            ((140, 90), (14, 4), 80),
            ((180, 90), (14, 4), 80),
            ((160, 125), (6, 14), 150),
            ((160, 155), (22, 7), 80),
        ):
            cv2.ellipse(scene, center, axes, 0, 0, 360, 16 * grey, -1)
        cv2.GaussianBlur(scene, (7, 7), 0, dst=scene)

    @staticmethod
    def _is_it(x: int, y: int, width: int, height: int) -> bool:
        """Is this square where the face was drawn?"""
        return abs(x + width / 2 - 160) < 20 and abs(y + height / 2 - 120) < 25 and 60 <= width <= 160


class Objects(Looking):
    """Recognition by features: ORB, matching by Hamming distance, a homography by RANSAC."""

    def __init__(self) -> None:
        # Only images for this have them.
        super().__init__(importlib.import_module("cv2"), importlib.import_module("numpy"))
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
        scene = self.camera.scene(seed)
        turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), float(rng.uniform(-40, 40)), float(rng.uniform(0.7, 1.2)))
        turn[:, 2] += (float(rng.uniform(40, 120)), float(rng.uniform(20, 60)))
        size = (WIDTH, HEIGHT)
        moved = cv2.warpAffine(self._drawn(wanted), turn, size)
        mask = cv2.warpAffine(numpy.full((SIDE, SIDE), 255, dtype=numpy.uint8), turn, size)
        scene[mask > 0] = 16 * moved[mask > 0].astype(numpy.int16)
        image = self.camera.shot(seed)
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
