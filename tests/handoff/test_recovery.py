"""What is left of a handoff whose worker died: every state of either side is brought to its end, whatever is heard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from haulier.errors import Cancelled, GuestError
from haulier.handoff import recovery, residence
from haulier.handoff.journal import HandoffRow
from haulier.handoff.ownership import Event, State
from haulier.handoff.recovery import handle
from haulier.process import ProcessId
from tests.handoff.hosts import GUEST, HANDOFF, Host, Hosts
from tests.support.freezing import as_container, freezable

MPTCP_OF_A_DEAD_ONE = '{"users": [{"pid": 1, "ticks": 1, "boot": "an earlier one"}], "numbers": {}, "steps": []}'


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path, monkeypatch)
    yield hosts
    hosts.close()


def assert_cleared(host: Host, *manifests: str) -> None:
    """Nothing of the guest is left but these manifests."""
    assert host.qemu is None
    assert host.files() == []
    assert host.manifests() == list(manifests)
    assert host.leases() == []
    assert not host.site.mirror(HANDOFF).exists()


def again(hosts: Hosts, host: Host) -> None:
    """Recovery once more, as if the agent had died before it noted the end: nothing more happens."""
    before = (host.row, host.qemu, host.files(), host.manifests())
    done = list(host.done)
    host.journal.update_handoff(HANDOFF, state="running", outcome="", ended=0.0)
    assert hosts.recover(host)
    assert (host.row, host.qemu, host.files(), host.manifests()) == before
    assert [what for what in host.done[len(done) :] if what in ("kill", "cont", "resume")] == []


# -- the source ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("status", ["running", "postmigrate", "paused", None])
def test_before_the_token_the_guest_runs_on_at_the_source(hosts: Hosts, status: str | None, reachable: bool) -> None:
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu, hosts.lisbon.reachable = status, reachable
    assert hosts.recover(oslo)
    assert (oslo.state, oslo.row.epoch, oslo.row.pending, oslo.row.last_epoch) == (State.OWNER, 3, 0, 4)
    assert oslo.qemu == ("running" if status else None)
    assert hosts.said == [("lisbon", "abort", 4)] and hosts.ran_when_said == [status is not None]
    assert (oslo.handoff.state, oslo.handoff.outcome) == ("ended", "failed")
    assert oslo.manifests() == [f"guest/{GUEST}"] and oslo.leases() == []
    assert oslo.files() == ["overlay.qcow2"]
    assert oslo.row.manifest == f"guest/{GUEST}" and oslo.row.wanted == "running"
    again(hosts, oslo)


def test_a_guest_that_does_not_run_on_is_in_no_handoff_any_more(hosts: Hosts) -> None:
    """Its operator can stop it; and it is tried again until then."""
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu, oslo.stuck = "paused", True
    for _ in range(2):
        with pytest.raises(GuestError, match="does not run again"):
            hosts.recover(oslo)
        assert oslo.state is State.OWNER and set(hosts.said) == {("lisbon", "abort", 4)}
    oslo.stuck = False
    assert hosts.recover(oslo)
    assert oslo.qemu == "running" and oslo.handoff.outcome == "failed" and oslo.leases() == []


def test_a_crash_between_the_record_and_the_resumption(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.OWNER, 3, 0, role="source", last=4)
    oslo.qemu = "postmigrate"
    assert hosts.recover(oslo)
    assert oslo.done == ["resume"] and oslo.handoff.outcome == "failed"
    assert oslo.leases() == []
    again(hosts, oslo)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_crash_between_the_record_and_the_word_of_it(hosts: Hosts, reachable: bool) -> None:
    """Who was not told would wait for two minutes. The guest does not wait for whom it takes long to tell."""
    oslo, lisbon = hosts.both
    oslo.record(State.OWNER, 3, 0, role="source", last=4)
    lisbon.record(State.RECEIVING, 0, 4, role="target")
    oslo.qemu, lisbon.qemu, lisbon.reachable = "postmigrate", "inmigrate", reachable
    assert hosts.recover(oslo)
    assert hosts.said == [("lisbon", "abort", 4)] and oslo.done == ["resume"]
    assert lisbon.state is (State.ABSENT if reachable else State.RECEIVING)
    assert lisbon.handoff.state == ("ended" if reachable else "running")
    assert oslo.qemu == "running" and hosts.runners() == ["oslo"]


@pytest.mark.root
@pytest.mark.parametrize("state", [State.OWNER, State.OFFERED])
def test_a_container_runs_on_whenever_its_worker_died(hosts: Hosts, state: State) -> None:
    """Also before the handoff had begun: a dump is tried first."""
    oslo = hosts.oslo
    oslo.record(state, 3, 4 if state is State.OFFERED else 0, role="source")
    with freezable() as (child, freezer):
        spec = as_container(oslo.site, GUEST, child)
        before = "h0" if state is State.OWNER else HANDOFF
        oslo.journal.advance(GUEST, state.value, state.value, spec=msgspec.to_builtins(spec), handoff=before)
        images = residence.images_dir(oslo.site, HANDOFF)
        images.mkdir(parents=True, exist_ok=True)
        freezer.freeze()
        assert hosts.recover(oslo)
        assert not freezer.asked() and not images.exists()
        assert oslo.handoff.outcome == "failed" and oslo.state is State.OWNER


def test_a_refusal_that_was_written_down_and_not_said(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.OFFERED, 3, 4, role="source")
    lisbon.record(State.REFUSED, 0, 0, role="target", last=4)
    oslo.qemu = "paused"
    assert hosts.recover(lisbon)
    assert hosts.said == [("oslo", "refused", 4)]
    assert oslo.state is State.OWNER and oslo.qemu == "running"
    assert_cleared(lisbon)


def test_a_token_without_an_answer_keeps_the_guest_stopped_and_is_repeated(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    oslo.qemu, lisbon.reachable = "postmigrate", False
    for _ in range(3):
        assert not hosts.recover(oslo)
    assert hosts.said == [("lisbon", "token", 4)] * 3
    assert oslo.state is State.GRANTED and oslo.qemu == "postmigrate" and oslo.done == []
    assert oslo.handoff.state == "running"


def test_the_token_is_taken_by_way_of_the_agents(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.READY, 0, 4, role="target")
    oslo.qemu, lisbon.qemu = "postmigrate", "paused"
    assert hosts.recover(oslo)
    assert (oslo.state, lisbon.state) == (State.AWAY, State.OWNER)
    assert (lisbon.row.epoch, lisbon.row.owner, lisbon.row.wanted) == (4, "lisbon", "running")
    assert (oslo.row.owner, oslo.row.epoch, oslo.row.wanted) == ("lisbon", 0, "")
    assert hosts.runners() == ["lisbon"] and [what for what in lisbon.done if what == "cont"] == ["cont"]
    assert_cleared(oslo, f"retained/{GUEST}")
    assert oslo.row.manifest == "", "there is no such manifest any more"
    assert lisbon.row.manifest == f"guest/{GUEST}" and lisbon.manifests() == [f"guest/{GUEST}"]
    assert lisbon.leases() == []
    assert {host.handoff.outcome for host in hosts.both} == {"done"}
    again(hosts, oslo)
    again(hosts, lisbon)


def test_a_token_for_a_copy_that_has_gone_comes_back(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.READY, 0, 4, role="target")
    oslo.qemu, lisbon.qemu = "postmigrate", None
    assert hosts.recover(oslo)
    assert (oslo.state, lisbon.state) == (State.OWNER, State.REFUSED)
    assert oslo.row.epoch == 5, "the granted epoch is burnt"
    assert hosts.runners() == ["oslo"]
    assert oslo.leases() == []
    assert_cleared(lisbon)
    assert (oslo.handoff.outcome, lisbon.handoff.outcome) == ("failed", "failed")
    assert oslo.row.manifest == f"guest/{GUEST}"


def test_an_answer_that_was_lost_is_given_again(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.OWNER, 4, 0, role="target")
    oslo.qemu, lisbon.qemu = "postmigrate", "running"
    assert hosts.recover(oslo)
    assert oslo.state is State.AWAY and lisbon.state is State.OWNER
    assert "cont" not in lisbon.done, "it runs already"
    assert_cleared(oslo, f"retained/{GUEST}")


def test_a_crash_while_the_original_was_cleared_away(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.AWAY, 0, 0, role="source", last=4)
    oslo.qemu = "postmigrate"
    assert hosts.recover(oslo)
    assert_cleared(oslo, f"retained/{GUEST}")
    assert oslo.handoff.outcome == "done" and oslo.row.manifest == ""
    again(hosts, oslo)


# -- the target ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("status", ["inmigrate", "paused", None])
def test_an_unfinished_copy_is_thrown_away(hosts: Hosts, status: str | None, reachable: bool) -> None:
    oslo, lisbon = hosts.both
    lisbon.record(State.RECEIVING, 0, 4, role="target")
    lisbon.qemu, oslo.reachable = status, reachable
    directory = lisbon.site.handoff_root(lisbon.handoff.id)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("job.json", "status.new", ".job.json.x1y2"):
        (directory / name).write_text("{")
    assert hosts.recover(lisbon)
    assert [path.name for path in directory.iterdir()] == ["job.json"], "what was just being written is gone"
    assert (lisbon.state, lisbon.row.pending) == (State.REFUSED, 0)
    assert hosts.said == [("oslo", "refused", 4)]
    assert_cleared(lisbon)
    assert lisbon.handoff.outcome == "failed"
    again(hosts, lisbon)


@pytest.mark.parametrize("state", [State.REFUSED, State.AWAY])
def test_a_crash_while_a_copy_was_thrown_away(hosts: Hosts, state: State) -> None:
    """The step is in the journal, by whoever died in the middle of carrying it out."""
    lisbon = hosts.lisbon
    lisbon.record(state, 0, 0, role="target", last=4)
    lisbon.qemu = "inmigrate"
    assert hosts.recover(lisbon)
    assert_cleared(lisbon)
    assert (lisbon.handoff.state, lisbon.handoff.outcome) == ("ended", "failed")
    again(hosts, lisbon)


def test_a_finished_copy_waits_stopped_while_nobody_answers(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    lisbon.record(State.READY, 0, 4, role="target")
    lisbon.qemu, oslo.reachable = "paused", False
    for _ in range(2):
        assert not hosts.recover(lisbon)
    assert lisbon.state is State.READY and lisbon.qemu == "paused" and lisbon.done == []
    assert hosts.said == [("oslo", "ready", 4)] * 2


def test_a_finished_copy_asks_and_gets_the_token(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.READY, 0, 4, role="target")
    oslo.qemu, lisbon.qemu = "postmigrate", "paused"
    assert hosts.recover(lisbon)
    assert lisbon.state is State.OWNER and hosts.runners() == ["lisbon"]
    assert hosts.recover(oslo)
    assert oslo.state is State.AWAY and hosts.runners() == ["lisbon"]


def test_a_finished_copy_whose_source_gave_up_is_thrown_away(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.OWNER, 3, 0, role="source", last=4)
    lisbon.record(State.READY, 0, 4, role="target")
    oslo.qemu, lisbon.qemu = "running", "paused"
    assert hosts.recover(lisbon)
    assert lisbon.state is State.ABSENT
    assert_cleared(lisbon)
    assert hosts.runners() == ["oslo"]


def test_a_finished_copy_that_died_is_refused(hosts: Hosts) -> None:
    lisbon = hosts.lisbon
    lisbon.record(State.READY, 0, 4, role="target")
    assert hosts.recover(lisbon)
    assert lisbon.state is State.REFUSED and hosts.said == [("oslo", "refused", 4)]
    assert_cleared(lisbon)


@pytest.mark.parametrize("status", ["paused", "running", None])
def test_a_crash_between_the_token_and_the_first_instruction(hosts: Hosts, status: str | None, tmp_path: Path) -> None:
    lisbon = hosts.lisbon
    lisbon.record(State.OWNER, 4, 0, role="target")
    lisbon.qemu = status
    told = tmp_path / "told"
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    hook.chmod(0o755)
    object.__setattr__(lisbon.site, "moved_hook", str(hook))
    assert hosts.recover(lisbon)
    assert lisbon.qemu == ("running" if status else None)
    assert lisbon.done == [*(["cont"] if status == "paused" else []), f"export guest/{GUEST}"]
    # Once, also of a guest that runs already: its worker may have died before its clients' network followed.
    assert (told.read_text() if told.exists() else "") == (f"{GUEST} 10.77.0.10 oslo lisbon\n" if status else "")
    assert lisbon.row.manifest == f"guest/{GUEST}" and lisbon.manifests() == [f"guest/{GUEST}"]
    assert lisbon.files() == ["overlay.qcow2"] and lisbon.leases() == []
    assert lisbon.handoff.outcome == "done"
    again(hosts, lisbon)


@pytest.mark.parametrize("status", ["paused", "running"])
def test_a_container_whose_arrival_is_not_settled_is_let_go_and_plugged_in(
    hosts: Hosts, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lisbon = hosts.lisbon
    lisbon.record(State.OWNER, 4, 0, role="target")
    done: list[str] = []
    standing = SimpleNamespace(
        status=lambda: status, cont=lambda: done.append("cont"), settle=lambda: done.append("settle")
    )
    monkeypatch.setattr(recovery, "adopt_container", lambda site, guest: standing)
    assert hosts.recover(lisbon)
    assert done == ["cont", "settle"] and lisbon.row.manifest == f"guest/{GUEST}"


# -- a guest that runs before its memory is whole -------------------------------------------------------------------


def filling(hosts: Hosts) -> tuple[Host, Host]:
    oslo, lisbon = hosts.both
    oslo.record(State.SERVING, 3, 4, role="source")
    lisbon.record(State.FILLING, 4, 0, role="target")
    oslo.qemu, lisbon.qemu = "finish-migrate", "running"
    oslo.migration = lisbon.migration = "postcopy-paused"
    oslo.journal.advance(GUEST, "serving", "serving", owner="lisbon", wanted="")
    lisbon.journal.advance(GUEST, "filling", "filling", owner="lisbon", wanted="running")
    return oslo, lisbon


@pytest.mark.parametrize("source", [State.GRANTED, State.SERVING])
def test_memory_that_is_under_way_waits_for_new_workers(hosts: Hosts, source: State) -> None:
    oslo, lisbon = filling(hosts)
    oslo.journal.advance(GUEST, "serving", source.value)
    for _ in range(2):
        assert not hosts.recover(oslo)
        assert not hosts.recover(lisbon)
    assert (oslo.state, lisbon.state) == (State.SERVING, State.FILLING)
    assert oslo.row.owner == "lisbon" and hosts.runners() == ["lisbon"]
    assert "kill" not in oslo.done + lisbon.done and "resume" not in oslo.done
    assert lisbon.row.manifest == f"guest/{GUEST}", "its disk is its own by now"


@pytest.mark.parametrize("status", ["paused", "running", "waits for a page"])
def test_a_crash_before_all_was_settled_is_made_good_although_qemu_may_not_answer(hosts: Hosts, status: str) -> None:
    _, lisbon = filling(hosts)
    lisbon.qemu = status
    assert not hosts.recover(lisbon)
    assert lisbon.done == [*(["cont"] if status == "paused" else []), f"export guest/{GUEST}"]
    assert lisbon.row.manifest == f"guest/{GUEST}" and lisbon.leases() == []
    assert not hosts.recover(lisbon)
    assert lisbon.done.count("cont") == (status == "paused")


def test_memory_that_had_all_come_frees_the_source(hosts: Hosts) -> None:
    oslo, lisbon = filling(hosts)
    lisbon.migration = "completed"
    assert hosts.recover(lisbon)
    assert (oslo.state, lisbon.state) == (State.AWAY, State.OWNER)
    assert {host.handoff.outcome for host in hosts.both} == {"done"} and hosts.runners() == ["lisbon"]
    assert_cleared(oslo, f"retained/{GUEST}")
    again(hosts, lisbon)


@pytest.mark.parametrize("first", ["source", "target"])
def test_memory_that_died_with_the_source_is_lost_and_the_disk_is_not(hosts: Hosts, first: str) -> None:
    oslo, lisbon = filling(hosts)
    oslo.qemu = None
    if first == "target":
        assert not hosts.recover(lisbon)
    assert hosts.recover(oslo)
    assert (oslo.state, lisbon.state) == (State.AWAY, State.OWNER)
    assert lisbon.qemu is None and lisbon.files() == ["overlay.qcow2"]
    assert lisbon.row.manifest == f"guest/{GUEST}" and lisbon.row.wanted == "running"
    for host in hosts.both:
        assert host.handoff.outcome == "failed" and "memory was whole" in str(host.handoff.detail["error"])


def test_memory_that_died_with_the_target_needs_nothing_any_more(hosts: Hosts) -> None:
    oslo, lisbon = filling(hosts)
    lisbon.qemu = None
    assert hosts.recover(lisbon)
    assert (oslo.state, lisbon.state) == (State.AWAY, State.OWNER)
    assert_cleared(oslo, f"retained/{GUEST}")
    assert lisbon.handoff.outcome == "failed" and "guest start" in str(lisbon.handoff.detail["error"])


def test_a_loss_of_which_the_word_was_lost_is_told_again(hosts: Hosts) -> None:
    oslo, lisbon = filling(hosts)
    oslo.qemu, lisbon.reachable = None, False
    assert hosts.recover(oslo)
    assert oslo.state is State.AWAY and lisbon.state is State.FILLING
    assert hosts.recover(lisbon)
    assert lisbon.state is State.OWNER and lisbon.qemu is None and lisbon.handoff.outcome == "failed"


@pytest.mark.parametrize("order", ["source first", "target first"])
def test_a_target_that_died_before_device_state_was_there(hosts: Hosts, order: str) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.POISED, 0, 4, role="target")
    oslo.qemu, oslo.migration, lisbon.qemu = "finish-migrate", "postcopy-paused", "inmigrate"
    turns = [oslo, lisbon] if order == "source first" else [lisbon, oslo]
    for host in turns:
        if host.handoff.state != "ended":
            assert hosts.recover(host)
    assert (oslo.state, lisbon.state) == (State.OWNER, State.REFUSED)
    assert oslo.qemu is None and oslo.files() == ["overlay.qcow2"], "it cannot run on there: only its disk is left"
    assert "guest start" in str(oslo.handoff.detail["error"])
    assert oslo.leases() == []
    assert_cleared(lisbon)


def test_a_copy_that_has_its_device_state_takes_the_token_from_the_agents(hosts: Hosts) -> None:
    oslo, lisbon = hosts.both
    oslo.record(State.GRANTED, 3, 4, role="source")
    lisbon.record(State.POISED, 0, 4, role="target")
    oslo.qemu, oslo.migration = "finish-migrate", "postcopy-paused"
    lisbon.qemu, lisbon.migration = "paused", "postcopy-paused"
    assert not hosts.recover(lisbon)
    assert not hosts.recover(oslo)
    assert (oslo.state, lisbon.state) == (State.SERVING, State.FILLING) and hosts.runners() == ["lisbon"]


# -- messages between agents ---------------------------------------------------------------------------------------


def test_while_a_worker_lives_the_matter_is_its_own(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    lisbon = hosts.lisbon
    lisbon.record(State.READY, 0, 4, role="target")
    lisbon.journal.update_handoff(HANDOFF, pid=4711)
    lisbon.qemu, hosts.worker_alive = "paused", True
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ProcessId, "signal", lambda worker, number: told.append((worker.pid, number)))
    for event, epoch in ((Event.TOKEN, 3), (Event.ABORT, 3), (Event.TOOK, 4)):
        handle(lisbon.site, lisbon.journal, GUEST, event, epoch)
    assert told == [], "these are of another time"
    for event in (Event.TOKEN, Event.ABORT):
        assert handle(lisbon.site, lisbon.journal, GUEST, event, 4) == []
    assert told == [(4711, recovery.LEFT_ALONE)] * 2, "the other worker is gone, or its agent would not speak"
    assert lisbon.state is State.READY and lisbon.qemu == "paused"


@pytest.mark.parametrize(
    ("event", "epoch", "answer", "state"),
    [
        (Event.TOKEN, 4, [("took", 4)], State.OWNER),
        (Event.TOKEN, 3, [("refused", 3)], State.READY),
        (Event.TOKEN, 9, [], State.READY),
        (Event.ABORT, 4, [], State.ABSENT),
        (Event.ABORT, 3, [], State.READY),
        (Event.TOOK, 4, [], State.READY),
        (Event.REFUSED, 4, [], State.READY),
    ],
)
def test_what_a_waiting_copy_answers(
    hosts: Hosts, event: Event, epoch: int, answer: list[tuple[str, int]], state: State
) -> None:
    lisbon = hosts.lisbon
    lisbon.record(State.READY, 0, 4, role="target")
    lisbon.qemu = "paused"
    assert handle(lisbon.site, lisbon.journal, GUEST, event, epoch) == answer
    assert lisbon.state is state
    assert lisbon.qemu == {State.OWNER: "running", State.READY: "paused"}.get(state)
    if event is Event.TOKEN and epoch == 4:
        assert handle(lisbon.site, lisbon.journal, GUEST, event, epoch) == answer, "as often as it is asked"
        assert [what for what in lisbon.done if what == "cont"] == ["cont"]


@pytest.mark.parametrize("event", [Event.READY, Event.TOKEN, Event.TOOK, Event.REFUSED, Event.ABORT])
def test_messages_about_a_guest_that_was_never_here(hosts: Hosts, event: Event) -> None:
    assert handle(hosts.lisbon.site, hosts.lisbon.journal, GUEST, event, 0) in ([], [("refused", 0)], [("took", 0)])
    assert hosts.lisbon.journal.find_guest(GUEST) is None


def test_what_needs_no_step_is_answered_while_a_worker_lives(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    oslo, lisbon = hosts.both
    hosts.worker_alive = True
    told: list[int] = []
    monkeypatch.setattr(ProcessId, "signal", lambda worker, number: told.append(worker.pid))
    lisbon.record(State.OWNER, 4, 0, role="target")
    lisbon.qemu = "running"
    assert handle(lisbon.site, lisbon.journal, GUEST, Event.TOKEN, 4) == [("took", 4)]
    assert len(told) == 1, "it need not wait for the source to say goodbye"
    oslo.record(State.GRANTED, 3, 4, role="source")
    assert handle(oslo.site, oslo.journal, GUEST, Event.READY, 4) == [("token", 4)]
    assert handle(oslo.site, oslo.journal, GUEST, Event.TOOK, 4) == [], "that is a step"
    assert oslo.state is State.GRANTED and oslo.done == [] and lisbon.done == []


def test_a_late_took_clears_the_source_away(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.GRANTED, 3, 4, role="source")
    oslo.qemu = "postmigrate"
    assert handle(oslo.site, oslo.journal, GUEST, Event.TOOK, 4) == []
    assert oslo.state is State.AWAY and oslo.handoff.outcome == "done" and oslo.row.manifest == ""
    assert_cleared(oslo, f"retained/{GUEST}")


def test_a_running_owner_is_touched_by_no_message(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu = "running"
    before = oslo.row
    for event in (Event.TOKEN, Event.TOOK, Event.ABORT, Event.READY):
        handle(oslo.site, oslo.journal, GUEST, event, 4)
    assert oslo.row == before and oslo.qemu == "running" and oslo.done == []


def test_a_handoff_of_which_the_guest_knows_nothing_just_ends(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu = "running"
    oslo.journal.add_handoff(HandoffRow("h0", GUEST, "source", "lisbon"))
    assert recovery.recover(oslo.site, oslo.journal, oslo.journal.handoff("h0"), hosts.messenger)
    assert oslo.journal.handoff("h0").outcome == "failed"
    assert oslo.state is State.OFFERED and hosts.said == []


def test_mptcp_that_a_dead_worker_had_set_up_is_taken_away(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu = "running"
    (oslo.site.run / "mptcp").write_text(MPTCP_OF_A_DEAD_ONE)
    assert hosts.recover(oslo)
    assert not (oslo.site.run / "mptcp").exists()


def test_a_worker_that_died_of_a_cancel_ends_as_cancelled(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.OFFERED, 3, 4, role="source")
    oslo.qemu = "running"
    oslo.journal.update_handoff(oslo.handoff.id, detail={"cancel": True})
    assert hosts.recover(oslo)
    assert (oslo.state, oslo.handoff.outcome) == (State.OWNER, "cancelled")
    assert oslo.handoff.detail["code"] == Cancelled.exit_code and "cancelled" in oslo.handoff.detail["error"]


def test_memory_lost_after_a_cancel_that_came_too_late_is_no_cancel(hosts: Hosts) -> None:
    oslo = hosts.oslo
    oslo.record(State.SERVING, 3, 4, role="source")
    oslo.qemu = None
    oslo.journal.update_handoff(oslo.handoff.id, detail={"cancel": True})
    hosts.recover(oslo)
    assert oslo.handoff.outcome == "failed"


# -- both at once --------------------------------------------------------------------------------------------------

CRASHES = [
    # source, its QEMU, target, its QEMU, who must run it
    (State.OFFERED, "running", None, None, "oslo"),
    (State.OFFERED, "running", State.RECEIVING, "inmigrate", "oslo"),
    (State.OFFERED, "finish-migrate", State.RECEIVING, "inmigrate", "oslo"),
    (State.OFFERED, "postmigrate", State.READY, "paused", "oslo"),
    (State.OFFERED, "postmigrate", State.REFUSED, None, "oslo"),
    (State.GRANTED, "postmigrate", State.READY, "paused", "lisbon"),
    (State.GRANTED, "postmigrate", State.READY, None, "oslo"),
    (State.GRANTED, "postmigrate", State.OWNER, "paused", "lisbon"),
    (State.GRANTED, "postmigrate", State.OWNER, "running", "lisbon"),
    (State.AWAY, "postmigrate", State.OWNER, "running", "lisbon"),
    (State.AWAY, None, State.OWNER, "paused", "lisbon"),
]


@pytest.mark.parametrize("order", ["source first", "target first", "target cannot be reached at first"])
@pytest.mark.parametrize("crash", CRASHES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{c[3]}")
def test_whatever_died_one_site_runs_the_guest_and_nothing_hangs(
    hosts: Hosts, crash: tuple[State, str | None, State | None, str | None, str], order: str
) -> None:
    source, source_qemu, target, target_qemu, runner = crash
    oslo, lisbon = hosts.both
    granted = source is State.GRANTED or source is State.OFFERED
    oslo.record(source, 0 if source is State.AWAY else 3, 4 if granted else 0, role="source", last=4)
    oslo.qemu = source_qemu
    if target is not None:
        owned = target is State.OWNER
        pending = 0 if owned or target is State.REFUSED else 4
        lisbon.record(target, 4 if owned else 0, pending, role="target", last=4)
        lisbon.qemu = target_qemu
    turns = [lisbon, oslo] if order == "target first" else [oslo, lisbon]
    lisbon.reachable = not order.startswith("target cannot")
    for _ in range(4):
        for host in turns:
            if host.journal.find_handoff(HANDOFF) is not None and host.handoff.state != "ended":
                hosts.recover(host)
            assert len(hosts.runners()) <= 1
        lisbon.reachable = True
    assert hosts.runners() == [runner]
    owner = oslo if runner == "oslo" else lisbon
    assert owner.state is State.OWNER
    assert owner.row.manifest == f"guest/{GUEST}" and owner.row.wanted == "running"
    other = lisbon if runner == "oslo" else oslo
    if target is not None:
        assert other.state in (State.AWAY, State.ABSENT, State.REFUSED)
        assert other.qemu is None and (other.files() == [] or target is State.REFUSED)
        assert other.handoff.state == "ended"
    assert owner.handoff.state == "ended"
