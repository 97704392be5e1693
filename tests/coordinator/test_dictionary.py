"""What the dictionary remembers in front of the database: never a wrong id, and not without bound."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO
from haulier.coordinator.bitmaps import Ids
from haulier.coordinator.dictionary import Dictionary
from haulier.coordinator.sqlite import SqliteBackend
from haulier.errors import UsageError
from tests.coordinator.samples import fps


class Counting(SqliteBackend):
    """Counts fingerprints that the database was asked for."""

    asked = 0

    def lookup(self, fingerprints: Sequence[bytes]) -> Ids:
        self.asked += len(fingerprints)
        return super().lookup(fingerprints)


@pytest.fixture
def backend(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "index.sqlite")


def test_what_was_asked_for_is_not_asked_for_again(backend: Counting) -> None:
    dictionary = Dictionary(backend)
    names = fps(range(1000))
    assert dictionary.lookup(b"".join(names[:10])).tolist() == [-1] * 10
    assert dictionary.intern(b"".join(names)).tolist() == list(range(1000))
    backend.asked = 0
    shuffled = random.Random(1).sample(range(1000), 1000)
    assert dictionary.lookup(b"".join(names[n] for n in shuffled)).tolist() == shuffled
    assert dictionary.intern(b"".join([names[5], names[5], ZERO, names[7]])).tolist() == [5, 5, -1, 7]
    assert backend.asked == 0
    assert Dictionary(backend).lookup(names[3] + fps([-1])[0]).tolist() == [3, -1]


def test_fingerprints_that_begin_alike_are_told_apart(backend: Counting) -> None:
    dictionary = Dictionary(backend)
    alike = [b"same8888" + bytes([n]) * 24 for n in range(20)]
    assert dictionary.intern(b"".join(alike)).tolist() == list(range(20))
    for _ in range(3):
        assert dictionary.lookup(b"".join(reversed(alike))).tolist() == list(reversed(range(20)))
    assert dictionary.lookup(b"same8888" + bytes([99]) * 24).tolist() == [-1]


def test_random_batches_give_what_the_database_gives(backend: Counting) -> None:
    dictionary = Dictionary(backend, most=300)
    rng = random.Random(3)
    names = fps(range(600))
    for _ in range(120):
        part = rng.choices(names, k=rng.randrange(60))
        data = b"".join(part)
        found = (dictionary.intern if rng.random() < 0.3 else dictionary.lookup)(data)
        assert found.tolist() == backend.lookup(part).tolist()
        assert sum(len(run.ids) for run in dictionary._runs) <= 300 + 60
        sizes = [len(run.ids) for run in dictionary._runs]
        assert all(a >= 2 * b for a, b in itertools.pairwise(sizes))


def test_parts_of_fingerprints_are_refused(backend: Counting) -> None:
    for data in (b"x", b"x" * 31, b"x" * 33):
        with pytest.raises(UsageError, match="whole number"):
            Dictionary(backend).lookup(data)
    assert Dictionary(backend).lookup(b"").tolist() == []
