"""The journal: exact expectations, durability, two processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from haulier.errors import Conflict, Corrupt, NotTrusted, UnknownThing
from haulier.handoff import journal as journal_module
from haulier.handoff.journal import GuestRow, HandoffRow, Journal, SiteRow, TokenRow, new_handoff_id
from haulier.handoff.recovery import worker_alive
from tests.support.processes import process_of, set_clock


@pytest.fixture
def journal(tmp_path: Path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


def test_a_guest_is_made_from_absent_and_read_back(journal: Journal) -> None:
    made = journal.advance("web1", "absent", "owner", owner="oslo", epoch=1, taken=1, spec={"name": "web1", "n": [1]})
    assert journal.guest("web1") == made
    assert made == GuestRow(
        name="web1", spec={"name": "web1", "n": [1]}, state="owner", owner="oslo", epoch=1, last_epoch=1, taken=1
    )
    assert journal.guests() == [made]


def test_advance_refuses_what_it_did_not_expect(journal: Journal) -> None:
    journal.advance("web1", "absent", "owner", owner="oslo", epoch=3, handoff="h1")
    before = journal.guest("web1")
    with pytest.raises(Conflict, match="is 'owner' at this site, not granted or offered"):
        journal.advance("web1", {"offered", "granted"}, "away")
    with pytest.raises(Conflict, match="epoch 3"):
        journal.advance("web1", "owner", "offered", expect_epoch=2)
    with pytest.raises(Conflict, match="'h1'"):
        journal.advance("web1", "owner", "offered", expect_handoff="h2")
    with pytest.raises(TypeError):
        journal.advance("web1", "owner", "offered", colour="red")
    assert journal.guest("web1") == before
    with pytest.raises(Conflict, match="is 'absent'"):
        journal.advance("web2", "owner", "offered")
    assert journal.find_guest("web2") is None


def test_the_last_epoch_never_falls_and_outlives_the_guest(journal: Journal) -> None:
    journal.advance("web1", "absent", "owner", epoch=1)
    journal.advance("web1", "owner", "offered", pending=2, last_epoch=2)
    assert journal.advance("web1", "offered", "owner", pending=0, last_epoch=0).last_epoch == 2
    assert journal.advance("web1", "owner", "owner", epoch=9).last_epoch == 9
    journal.advance("web1", "owner", "absent", epoch=0, spec={})
    assert journal.guest("web1").last_epoch == 9


def test_a_transaction_is_all_or_nothing_and_may_be_nested(journal: Journal) -> None:
    with pytest.raises(RuntimeError, match="boom"), journal.transaction():
        journal.advance("web1", "absent", "owner", epoch=1)
        journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon"))
        raise RuntimeError("boom")
    assert journal.guests() == [] and journal.handoffs() == []
    with journal.transaction():
        journal.advance("web1", "absent", "owner", epoch=1)
        with pytest.raises(Conflict):
            journal.advance("web1", "absent", "owner", epoch=1)
        journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon"))
    assert journal.guest("web1").epoch == 1
    assert journal.handoff("h1").guest == "web1"


def test_handoffs_are_updated_listed_and_ended_once(journal: Journal) -> None:
    journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon", created=1.0))
    journal.add_handoff(HandoffRow("h2", "web2", "target", "lisbon", created=2.0))
    with pytest.raises(Conflict, match="h1"):
        journal.add_handoff(HandoffRow("h1", "web9", "source", "lisbon"))
    assert journal.update_handoff("h1", phase="memory", detail={"bytes": 7}).detail == {"bytes": 7}
    assert [row.id for row in journal.handoffs()] == ["h2", "h1"]
    ended = journal.end_handoff("h1", "done")
    assert ended.outcome == "done" and ended.ended > 0
    assert journal.end_handoff("h1", "failed").outcome == "done"
    assert [row.id for row in journal.handoffs(live=True)] == ["h2"]
    assert [row.id for row in journal.handoffs(guest="web1")] == ["h1"]
    with pytest.raises(UnknownThing, match="h7"):
        journal.update_handoff("h7", phase="x")


def test_handoffs_of_long_ago_cost_nothing(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a site ever did only what is asked for is read, as it is asked for every few seconds."""
    with journal.transaction():
        for n in range(200):
            journal.add_handoff(
                HandoffRow(f"h{n}", f"web{n % 50}", "target", "oslo", "ended", created=n + 1.0, ended=n + 2.0)
            )
        journal.update_handoff("h7", detail={"residual": "held"})
        journal.update_handoff("h8", detail={"residual": "released", "said": {"residual": "held"}})
        journal.update_handoff("h9", detail={"residual": "released"})
        journal.add_handoff(HandoffRow("live", "web1", "source", "oslo", created=500.0))
    decoded: list[str] = []
    decode = journal_module._handoff
    monkeypatch.setattr(journal_module, "_handoff", lambda row: decoded.append(row["id"]) or decode(row))
    asked: list[str] = []
    journal._db.set_trace_callback(asked.append)
    for found, expected in (
        (journal.handoffs(held=True), ["h7"]),
        (journal.handoffs("web7", held=True), ["h7"]),
        (journal.handoffs("web6", held=True), []),
        (journal.handoffs(live=True), ["live"]),
        (journal.handoffs("web1", live=True), ["live"]),
        (journal.handoffs(ended_after=200.0), ["h199"]),
        (journal.handoffs(ended_after=201.0), []),
        (journal.handoffs("web1"), ["live", "h151", "h101", "h51", "h1"]),
    ):
        assert [row.id for row in found] == expected
    journal._db.set_trace_callback(None)
    assert len(decoded) == 11
    for query in asked:
        plan = journal._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert "USING INDEX handoffs_" in plan[0]["detail"], query


def test_a_journal_without_indexes_is_given_them_when_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.sqlite"

    def indexes(db: sqlite3.Connection) -> int:
        return db.execute("SELECT count(*) FROM sqlite_master WHERE name GLOB 'handoffs_*'").fetchone()[0]

    with Journal(path) as journal:
        assert indexes(journal._db) == 4
        for name in ("guest", "ended", "live", "held"):
            journal._db.execute(f"DROP INDEX handoffs_{name}")
        journal.add_handoff(HandoffRow("h1", "web1", "target", "oslo", detail={"residual": "held"}))
        journal._db.execute("UPDATE handoffs SET detail='{\"residual\": \"held\"' WHERE id='h1'")
        monkeypatch.setattr(journal_module, "_BUSY_S", 0.1)
        with journal.transaction(), Journal(path) as other:
            assert indexes(other._db) == 0 and other.handoffs("web2") == []
    with Journal(path) as journal:
        assert indexes(journal._db) == 4
        with pytest.raises(Corrupt, match="h1"):
            journal.handoffs(held=True)
        # Who opens it next does not wait for who is writing: there is nothing to be made any more.
        with journal.transaction(), Journal(path) as other:
            assert other.guests() == []


def test_handoff_ids_are_names(journal: Journal) -> None:
    from haulier.agent.site import check_name

    ids = {check_name(new_handoff_id(), "handoff") for _ in range(1000)}
    assert len(ids) == 1000


def test_sites(journal: Journal) -> None:
    journal.put_sites([SiteRow("oslo", "10.0.0.1:7447", ("10.0.0.1", "10.1.0.1"), True), SiteRow("lisbon", "l:1")])
    assert [s.name for s in journal.sites()] == ["lisbon", "oslo"]
    assert journal.site("oslo").bulk == ("10.0.0.1", "10.1.0.1") and journal.site("oslo").issuer
    with pytest.raises(UnknownThing, match="unknown site 'porto': known are lisbon, oslo"):
        journal.site("porto")


def test_a_token_is_used_once_in_time_and_by_whom_it_is_for(journal: Journal) -> None:
    journal.add_token(TokenRow(b"a" * 32, expires=1e12))
    journal.add_token(TokenRow(b"b" * 32, expires=1e12, site="lisbon"))
    journal.add_token(TokenRow(b"c" * 32, expires=time.time() + 60))
    with pytest.raises(NotTrusted, match="not known"):
        journal.use_token(b"x" * 32, "lisbon", 5.0)
    journal.use_token(b"a" * 32, "lisbon", 5.0)
    with pytest.raises(NotTrusted, match="used already, by site 'lisbon'"):
        journal.use_token(b"a" * 32, "porto", 6.0)
    with pytest.raises(NotTrusted, match="is for site 'lisbon'"):
        journal.use_token(b"b" * 32, "porto", 6.0)
    with pytest.raises(NotTrusted, match="expired 5 s ago"):
        journal.use_token(b"c" * 32, "porto", time.time() + 65)


def _race(path: str, barrier, results) -> None:
    with Journal(path) as journal:
        barrier.wait()
        try:
            journal.advance("web1", "owner", "offered", handoff=str(os.getpid()))
            results.put(os.getpid())
        except Conflict:
            results.put(0)


def test_of_processes_that_race_for_a_guest_one_wins(journal: Journal) -> None:
    journal.advance("web1", "absent", "owner", epoch=1)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(str(journal.path), barrier, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    answers = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    (winner,) = [answer for answer in answers if answer]
    assert journal.guest("web1").handoff == str(winner)
    results.close()
    results.join_thread()


def test_what_advance_returned_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    script = (
        "import sys, time; from haulier.handoff.journal import Journal\n"
        "j = Journal(sys.argv[1]); j.advance('web1', 'absent', 'owner', epoch=1)\n"
        "with j.transaction():\n"
        "    j.advance('web1', 'owner', 'offered', pending=2); print('open', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"open\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with Journal(path) as journal:
        assert journal.guest("web1").state == "owner"
        journal.advance("web1", "owner", "offered", pending=2)


def test_synchronous_full_in_every_connection(journal: Journal) -> None:
    with Journal(journal.path) as second:
        for each in (journal, second):
            assert each._db.execute("PRAGMA synchronous").fetchone()[0] == 2
            assert each._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_damaged_or_newer_file_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"this is no database" * 100)
    with pytest.raises(Corrupt, match="restore it"):
        Journal(bad)
    new = tmp_path / "new.sqlite"
    connection = sqlite3.connect(new)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(Corrupt, match="newer haulier"):
        Journal(new)


def as_written_by(journal: Journal, schema: int) -> None:
    """The columns as before schema 3."""
    for change in ("DROP COLUMN pid_ticks", "DROP COLUMN pid_boot", "ADD COLUMN pid_started REAL NOT NULL DEFAULT 0.0"):
        journal._db.execute(f"ALTER TABLE handoffs {change}")
    journal._db.execute(f"PRAGMA user_version={schema}")


def test_a_file_of_an_older_haulier_is_taken_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put_sites([SiteRow("oslo", "o:1", issuer=True)])
        journal._db.execute("DROP TABLE revoked")
        as_written_by(journal, 1)
    with Journal(path) as journal:
        assert journal.site("oslo") == SiteRow("oslo", "o:1", issuer=True)
        journal.revoke("oslo", 7.0)
        assert journal.site("oslo").begins == 7.0


def test_a_worker_of_an_older_haulier_is_still_known(tmp_path: Path) -> None:
    """It was written down with the time of day at which it began."""
    path = tmp_path / "journal.sqlite"
    with subprocess.Popen(["sleep", "600"]) as lives:
        try:
            began = psutil.Process(lives.pid).create_time()
            with Journal(path) as journal:
                for name, pid in (("h1", lives.pid), ("h2", lives.pid), ("h3", 0)):
                    journal.add_handoff(HandoffRow(name, "web1", "source", "lisbon", pid=pid, detail={"n": 1}))
                as_written_by(journal, 2)
                for name, at in (("h1", began), ("h2", began - 60)):
                    journal._db.execute("UPDATE handoffs SET pid_started=? WHERE id=?", (at, name))
            with Journal(path) as journal:
                assert [worker_alive(journal.handoff(name)) for name in ("h1", "h2", "h3")] == [True, False, False]
                assert journal.handoff("h1").detail == {"n": 1}
                again = journal.add_handoff(HandoffRow("h4", "web1", "source", "lisbon", pid_ticks=7, pid_boot="b"))
                assert journal.handoff("h4") == again
        finally:
            lives.kill()


def test_a_worker_lives_on_when_the_clock_is_set(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "600"]) as lives:
        try:
            journal.add_handoff(HandoffRow("h1", "web1", "source", "lisbon"))
            row = journal.set_worker("h1", process_of(lives))
            set_clock(monkeypatch, 3600.0)
            assert worker_alive(row) and worker_alive(journal.handoff("h1"))
        finally:
            lives.kill()
    assert not worker_alive(row)


def test_what_was_revoked_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.put_sites([SiteRow("oslo", "o:1"), SiteRow("porto", "p:1")])
        for begins in (5.0, 9.0, 7.0):
            journal.revoke("oslo", begins)
        journal.drop_site("oslo")
        assert [row.name for row in journal.sites()] == ["porto"]
    with Journal(path) as journal:
        assert journal.revoked() == {"oslo": 9.0}
        journal.put_sites([SiteRow("oslo", "o:2", begins=3.0)])
        assert journal.site("oslo").begins == 9.0 and journal.site("porto").begins == 0.0


def test_damaged_json_is_corrupt(journal: Journal) -> None:
    journal.advance("web1", "absent", "owner", epoch=1)
    journal._db.execute("UPDATE guests SET spec='[1'")
    with pytest.raises(Corrupt, match="web1"):
        journal.guest("web1")


def test_nobody_else_reads_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    for existed in (False, True):
        if existed:
            path.chmod(0o644)  # as an older haulier made it
        with Journal(path):
            assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_one_that_is_opened_again_beside_another_keeps_what_both_write(tmp_path: Path) -> None:
    """A process that ends removes SQLite's log unless it sees that somebody else still has the journal open."""
    path = tmp_path / "journal.sqlite"
    ends = f"from haulier.handoff.journal import Journal; Journal({str(path)!r}).close()"
    with Journal(path) as kept:
        kept.advance("web1", "absent", "owner", epoch=1)
        with Journal(path):
            pass
        subprocess.run([sys.executable, "-c", ends], check=True)
        kept.advance("web2", "absent", "owner", epoch=1)
        read = (
            f"from haulier.handoff.journal import Journal; print([row.name for row in Journal({str(path)!r}).guests()])"
        )
        said = subprocess.run([sys.executable, "-c", read], check=True, capture_output=True, text=True).stdout
        assert said == "['web1', 'web2']\n"
