"""The coordinator against a model in memory: random reports, questions, forgetting and restarts in any order."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator.index import DEFAULT_RATE, DEFAULT_RTT
from haulier.units import CHUNK
from tests.coordinator.samples import Clock, Site, fp, fps, manifest, sqlite_coordinator

MOST = 24
SITES = ["oslo", "lisbon", "rome"]
sites = st.sampled_from(SITES)
numbers = st.sets(st.integers(0, MOST - 1), max_size=8)
images = st.sampled_from([range(6), range(4, 12), range(0, MOST, 3), [7]])
titles = st.sampled_from(["image/a", "image/b", "guest/g"])


class Model(RuleBasedStateMachine):
    """`held[site]`, `names[site][name]` -> chunks, `links[source, target]`, `asked[chunk]`."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="haulier-coord-model"))
        self.clock = Clock()
        self.coordinator = sqlite_coordinator(self.folder, self.clock)
        self.held: dict[str, set[int]] = {}
        self.names: dict[str, dict[str, tuple[int, ...]]] = {}
        self.links: dict[tuple[str, str], tuple[float, float, float]] = {}
        self.asked = dict.fromkeys(range(MOST), 0)

    def site(self, name: str) -> Site:
        return Site(self.coordinator, name)

    # -- reports

    @rule(site=sites, added=numbers, removed=numbers, replace=st.booleans())
    def report(self, site: str, added: set[int], removed: set[int], replace: bool) -> None:
        self.site(site).report(sorted(added), sorted(removed), replace=replace)
        before = set() if replace else self.held.get(site, set()) - removed
        self.held[site] = before | added

    @rule(site=sites, stale=st.integers(1, 3), added=numbers)
    def report_on_a_wrong_base(self, site: str, stale: int, added: set[int]) -> None:
        revision = self.site(site).hello().revision
        report = m.HoldingsReport(base=revision + stale, added=m.join(fps(sorted(added))))
        assert self.coordinator.holdings(site, report) == m.HoldingsAnswer(revision=revision, again=True)

    @rule(site=sites, name=titles, chunks=images)
    def has_manifest(self, site: str, name: str, chunks: list[int]) -> None:
        digest = self.site(site).has_manifest(name, chunks)
        self.names.setdefault(site, {})[name] = tuple(chunks)
        self.site(site).report(complete=[digest])
        self.held[site] = self.held.get(site, set()) | set(chunks)

    @rule(site=sites, name=titles)
    def loses_manifest(self, site: str, name: str) -> None:
        self.coordinator.manifests(site, m.ManifestsReport(removed=[name]))
        self.names.get(site, {}).pop(name, None)

    @rule(site=sites)
    def names_manifests_anew(self, site: str) -> None:
        self.coordinator.manifests(site, m.ManifestsReport(replace=True))
        self.names[site] = {}

    @rule(site=sites, source=sites, rate=st.floats(1e5, 1e9), rtt=st.floats(0, 1), at=st.integers(0, 5))
    def measures(self, site: str, source: str, rate: float, rtt: float, at: int) -> None:
        entry = m.LinkEntry(source=source, rate_bps=rate, rtt_s=rtt, measured=float(at))
        self.coordinator.link_report(site, m.LinksReport(links=[entry]))
        known = self.links.get((source, site))
        if source != site and (known is None or known[2] < at):
            self.links[source, site] = (rate, rtt, float(at))

    @rule(site=sites)
    def forget(self, site: str) -> None:
        self.coordinator.forget(site)
        self.held.pop(site, None)
        self.names.pop(site, None)
        self.links = {key: link for key, link in self.links.items() if site not in key}

    @rule()
    def restart(self) -> None:
        self.coordinator.close()
        self.coordinator.backend.close()
        self.coordinator = sqlite_coordinator(self.folder, self.clock)

    # -- questions

    @rule(site=sites, wanted=st.lists(st.integers(0, MOST + 3), max_size=12), limit=st.integers(1, 3))
    def ask(self, site: str, wanted: list[int], limit: int) -> None:
        answer = self.coordinator.holders(m.HoldersQuery(fingerprints=m.join(fps(wanted)), site=site, limit=limit))
        for chunk in wanted:
            if chunk in self.asked:
                self.asked[chunk] += 1
        mine = self.held.get(site, set())
        lacking = bitmaps.unpack(answer.lacking, len(wanted)).tolist()
        assert lacking == [chunk not in mine for chunk in wanted]
        others = {name: held for name, held in self.held.items() if name != site and held & set(wanted)}
        found = {source.site: source for source in answer.sources}
        assert len(found) == min(limit, len(others)) and found.keys() <= others.keys()
        for name, source in found.items():
            assert bitmaps.unpack(source.positions, len(wanted)).tolist() == [c in others[name] for c in wanted]
            rate, rtt, _ = self.links.get((name, site), (DEFAULT_RATE, DEFAULT_RTT, 0.0))
            held = len(others[name] & set(wanted))
            assert source.held == held and math.isclose(source.cost_s, held * CHUNK * 8 / rate + rtt)
        covered = set().union(*(others[name] for name in found)) & set(wanted)
        if limit >= len(others):
            assert covered == set().union(*others.values()) & set(wanted)
            known = self.known
            assert answer.unheld == len(set(wanted) & known - covered) + sum(c not in known for c in wanted)

    @property
    def known(self) -> set[int]:
        """Chunks that the dictionary has."""
        return set(range(MOST)) & {c for c in range(MOST) if self.coordinator.backend.lookup([fp(c)])[0] >= 0}

    @rule(site=sites)
    def facts(self, site: str) -> None:
        answer = self.coordinator.facts(m.FactsQuery(fingerprints=m.join(fps(range(MOST))), site=site))
        uses = [chunks for names in self.names.values() for chunks in names.values()]
        assert answer.references == [sum(c in chunks for chunks in uses) for c in range(MOST)]
        assert answer.copies == [sum(c in held for held in self.held.values()) for c in range(MOST)]
        for chunk, seconds in enumerate(answer.refetch_s):
            ways = [
                CHUNK * 8 / rate + rtt
                for name, held in self.held.items()
                if name != site and chunk in held
                for rate, rtt, _ in [self.links.get((name, site), (DEFAULT_RATE, DEFAULT_RTT, 0.0))]
            ]
            assert math.isclose(seconds, min(ways, default=-1.0))

    @rule(site=st.sampled_from([*SITES, ""]))
    def unreferenced(self, site: str) -> None:
        found: list[bytes] = []
        after = ""
        while True:
            answer = self.coordinator.unreferenced(site or None, bytes.fromhex(after), limit=3)
            found += m.split(answer.fingerprints)
            after = answer.after
            if not after:
                break
        of = [site] if site else SITES
        held = set().union(*(self.held.get(name, set()) for name in of))
        used = {c for name in of for chunks in self.names.get(name, {}).values() for c in chunks}
        assert sorted(found) == sorted(fps(held - used))

    @rule(name=titles)
    def image(self, name: str) -> None:
        for site, names in self.names.items():
            if name in names:
                digest = manifest(names[name]).digest
                answer = self.coordinator.image_holders(m.ImageQuery(digest=digest, site=site))
                chunks = set(names[name])
                assert answer.chunks == len(chunks)
                assert answer.lacking == len(chunks - self.held.get(site, set()))

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "coordinator"):
            assert self.coordinator.index.pairs() == sum(map(len, self.held.values()))
            links = {(each["from"], each["to"]): each for each in self.coordinator.links()}
            assert links.keys() == self.links.keys()
            for key, (rate, rtt, at) in self.links.items():
                assert (links[key]["rate_bps"], links[key]["rtt_s"], links[key]["measured"]) == (rate, rtt, at)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.coordinator.backend.close()
            shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
