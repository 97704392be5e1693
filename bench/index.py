"""The coordinator's chunk index: dictionary and bitmaps against one row a (chunk, site) pair, in the same SQLite; the
same on PostgreSQL; bytes a pair; and a fleet of 10,000 sites.

Without PostgreSQL's programs those rows are missing and a note says so. Servers run on loopback, in a temporary
directory, without fsync: what is measured is the index, not this machine's disk.
"""

from __future__ import annotations

import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import Report, Target

from haulier.chunks.manifest import Manifest
from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator.backend import Backend, intern
from haulier.coordinator.index import ChunkIndex, Link
from haulier.coordinator.service import Coordinator
from haulier.coordinator.sqlite import SqliteBackend
from haulier.units import CHUNK

QUERY = 16384
SITES, IMAGES_A_SITE, IMAGES = 10_000, 60, 600


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(work: Callable[[], Any], times: int = 5) -> float:
    work()
    return statistics.median(seconds(work) for _ in range(times))


class Names:
    """Fingerprints of two images: the second shares half with the first."""

    def __init__(self, count: int) -> None:
        raw = np.random.default_rng(7).bytes(32 * (count + count // 2))
        self.count = count
        self.all = [raw[at : at + 32] for at in range(0, len(raw), 32)]
        self.first, self.second = self.all[:count], self.all[count // 2 :]
        self.query = self.second[: QUERY // 2] + self.second[-QUERY // 2 :]


# -- ours


def report(coordinator: Coordinator, site: str, fingerprints: list[bytes]) -> None:
    revision = coordinator.hello(site, m.HelloReport(control="")).revision
    for at in range(0, len(fingerprints), m.BATCH):
        data = m.join(fingerprints[at : at + m.BATCH])
        revision = coordinator.holdings(site, m.HoldingsReport(base=revision, added=data)).revision


def report_manifest(coordinator: Coordinator, site: str, manifest: Manifest) -> None:
    """As an agent does with an image: its digest is enough where the manifest is known."""
    revision = coordinator.hello(site, m.HelloReport(control="")).revision
    entry = m.ManifestEntry(name="image/one", digest=manifest.digest, size=manifest.size)
    assert not coordinator.manifests(site, m.ManifestsReport(manifests=[entry])).unknown
    answer = coordinator.holdings(site, m.HoldingsReport(base=revision, complete=[manifest.digest]))
    assert not answer.again


def ask(coordinator: Coordinator, names: Names) -> None:
    answer = coordinator.holders(m.HoldersQuery(site="one", fingerprints=m.join(names.query)))
    assert answer.sources and any(answer.lacking)


def ours(backend: Backend, names: Names) -> dict[str, float]:
    coordinator = Coordinator(backend)
    found = {"register new": seconds(lambda: report(coordinator, "one", names.first))}
    report(coordinator, "two", names.second)
    found["register known"] = seconds(lambda: report(coordinator, "three", names.first))
    found["ask 16k"] = median(lambda: ask(coordinator, names))
    # the dictionary remembers what went through it: as after a restart, it does not
    cold = []
    for _ in range(5):
        restarted = Coordinator(backend)
        cold.append(seconds(lambda c=restarted: ask(c, names)))
    found["ask 16k, after a restart"] = statistics.median(cold)
    fresh = Coordinator(backend)
    found["register known, after a restart"] = seconds(lambda: report(fresh, "three", names.first))
    coordinator = Coordinator(backend)
    manifest = Manifest(names.count * CHUNK, b"".join(names.first))
    entry = m.ManifestEntry(name="image/one", digest=manifest.digest, size=manifest.size)
    coordinator.manifests("one", m.ManifestsReport(manifests=[entry]))
    coordinator.register(manifest.digest, manifest)
    found["register known by digest"] = seconds(lambda: report_manifest(coordinator, "four", manifest))
    return found


# -- the other way: one row a pair


def rows(path: Path, names: Names) -> dict[str, float]:
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-65536")
    db.execute("CREATE TABLE held (fp BLOB, site INTEGER, PRIMARY KEY (fp, site)) WITHOUT ROWID")

    def put(site: int, fingerprints: list[bytes]) -> None:
        for at in range(0, len(fingerprints), m.BATCH):
            db.execute("BEGIN")
            part = sorted(fingerprints[at : at + m.BATCH])
            db.executemany("INSERT OR IGNORE INTO held VALUES (?,?)", [(fp, site) for fp in part])
            db.execute("COMMIT")

    def look() -> None:
        held: dict[int, set[bytes]] = {}
        wanted = sorted(names.query)
        for at in range(0, len(wanted), 900):
            part = wanted[at : at + 900]
            for fp, site in db.execute(f"SELECT fp, site FROM held WHERE fp IN ({','.join('?' * len(part))})", part):
                held.setdefault(site, set()).add(fp)
        assert [fp for fp in names.query if fp not in held[1]]

    found = {"register new": seconds(lambda: put(1, names.first))}
    put(2, names.second)
    found["register known"] = seconds(lambda: put(3, names.first))
    found["ask 16k"] = median(look)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found["bytes"] = path.stat().st_size / (names.count * 3.0)
    db.close()
    return found


# -- sizes, and a large fleet


def bytes_a_pair(path: Path, names: Names) -> dict[str, float]:
    """What the database keeps of a site's holdings, by (chunk, site) pair."""
    rng = np.random.default_rng(9)
    backend = SqliteBackend(path)
    coordinator = Coordinator(backend)
    intern(backend, names.all)
    count = len(names.all)
    scattered = rng.choice(count, count // 20, replace=False)
    image = np.arange(count // 8, count // 8 + count // 4)
    image = np.concatenate([image[rng.random(len(image)) > 0.1], rng.choice(count, len(image) // 20)])
    found = {}
    for site, ids in (("scattered", scattered), ("image-like", image)):
        report(coordinator, site, [names.all[at] for at in np.unique(ids).tolist()])
        size = backend.run(lambda rows, s=site: rows.all("SELECT sum(length(bits)) FROM holdings WHERE site=?", (s,)))
        found[site] = size[0][0] / len(np.unique(ids))
    backend.close()
    return found


def large_fleet() -> tuple[float, float, int]:
    """(seconds to find the best sources of an image, MB that all bitmaps take, pairs)."""
    rng = np.random.default_rng(11)
    index = ChunkIndex()
    for number in range(SITES):
        bits = bitmaps.empty()
        for image in rng.choice(IMAGES, IMAGES_A_SITE, replace=False).tolist():
            bits.add_range(image * QUERY, (image + 1) * QUERY)
        bits.run_optimize()
        index.holdings[f"site{number}"] = bits
    size = sum(len(bitmaps.dump(bits)) for bits in index.holdings.values())
    links = {f"site{n}": Link(float(rng.integers(5, 1000)) * 1e6, float(rng.random()) / 5) for n in range(SITES)}
    wanted = np.arange(17 * QUERY, 18 * QUERY, dtype=np.int64)

    def best() -> None:
        found, unheld = index.holders(wanted, links, {"site0"})
        assert len(found) == 16 and not unheld

    return median(best), size / 1e6, index.pairs()


def run(quick: bool) -> Report:
    names = Names(200_000 if quick else 1_000_000)
    scale = 1_000_000 / names.count
    kinds: dict[str, dict[str, float]] = {}
    notes = []
    with tempfile.TemporaryDirectory(prefix="haulier-bench-") as folder:
        place = Path(folder)
        backend = SqliteBackend(place / "index.sqlite")
        kinds["sqlite"] = ours(backend, names)
        backend.close()
        other = rows(place / "rows.sqlite", names)
        pairs = bytes_a_pair(place / "pairs.sqlite", names)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        from tests.support.postgres import programs, servers

        programs()
    except (ImportError, AssertionError) as error:
        notes.append(f"no PostgreSQL: {error}")
    else:
        from haulier.coordinator.postgres import PostgresBackend
        from haulier.coordinator.shards import spread

        with servers() as made:
            one = PostgresBackend(made.new("one").url)
            kinds["postgresql"] = ours(one, names)
            one.close()
            head = made.new("head")
            spread(head.url, [made.new(f"shard{n}").url for n in range(3)])
            many = PostgresBackend(head.url)
            kinds["postgresql, 3 shards"] = ours(many, names)
            many.close()
    best, memory, count = large_fleet()
    table: list[dict[str, object]] = []

    def row(what: str, kind: str, unit: str, value: float, base: float) -> None:
        table.append({"ratio": base / value, "what": what, "back end": kind, "unit": unit})
        table[-1] |= {"bitmaps": value, "rows, sqlite": base}

    for kind, found in kinds.items():
        for what, value in found.items():
            base = other.get(what.partition(",")[0], other["register known"])
            row(what, kind, "ms", value * 1000, base * 1000)
    for what, value in pairs.items():
        row(f"a pair, {what}", "sqlite", "bytes", value, other["bytes"])
    targets = [
        Target.at_most("register a known image of 1M chunks, SQLite, s", kinds["sqlite"]["register known"] * scale, 4),
        Target.at_most("ask about 16k chunks, SQLite, ms", kinds["sqlite"]["ask 16k"] * 1000, 60),
        Target.at_most(
            "ask about 16k chunks, after a restart, SQLite, ms", kinds["sqlite"]["ask 16k, after a restart"] * 1000, 60
        ),
        Target.at_most("a pair, scattered, bytes", pairs["scattered"], 2.5),
        Target.at_most("a pair, image-like, bytes", pairs["image-like"], 0.5),
        Target.at_most(f"best sources among {SITES} sites of {IMAGES_A_SITE} images, ms", best * 1000, 20),
    ]
    for kind in ("postgresql", "postgresql, 3 shards"):
        if kind in kinds:
            for when in ("", ", after a restart"):
                value = kinds[kind][f"ask 16k{when}"] * 1000
                targets.append(Target.at_most(f"ask about 16k chunks{when}, {kind}, ms", value, 250))
            known = kinds[kind]["register known"] * scale
            targets.append(Target.at_most(f"register a known image of 1M chunks, {kind}, s", known, 4))
    notes.append(f"{names.count} chunks are registered; {SITES} sites: {count:.2e} pairs in {memory:.1f} MB")
    if quick:
        notes.append("quick: times to register are scaled to 1M chunks for the target")
    return Report(table, targets, notes=notes)
