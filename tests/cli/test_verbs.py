"""Verbs against an agent in this process: words, tables, JSON, exit codes."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.agent.server import Agent
from haulier.cli import main
from haulier.cli.guest import by_family
from haulier.cli.main import VERBS, refused
from haulier.errors import HaulierError, NoRoom, UsageError
from haulier.handoff.journal import HandoffRow
from tests.support.agents import free_port, make_site, running

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hcl-", dir="/tmp"))
    yield path / "o"
    shutil.rmtree(path)


@pytest.fixture
def agent(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setenv("HAULIER_ROOT", str(root))
    with running(make_site(root, "oslo")) as agent:
        yield agent


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"haulier {verb}" in out


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in VERBS)
    assert run("--version")[1].strip() == "0.1.0"


@pytest.mark.parametrize(
    "words",
    [
        ("frob",),
        ("guest",),
        ("guest", "run"),
        ("guest", "run", "a"),
        ("handoff", "a"),
        ("site", "init", "a"),
        ("gc", "x"),
    ],
)
def test_words_that_make_no_sense(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    if words == ("guest",):
        assert code == 0 and "list" in out  # a noun alone shows its verbs
    else:
        assert code == 2 and err.startswith("haulier: ") and "--help" in err


def test_no_site(run: Run, tmp_path: Path) -> None:
    code, _, err = run("guest", "list", "--root", str(tmp_path))
    assert code == 3 and "haulier site init" in err


def test_what_the_system_refuses_is_said_in_a_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code, _, err = run("site", "init", "oslo", "--address", "h:1", "--root", str(file))
    assert code == 1 and str(file) in err and "Traceback" not in err
    assert run("guest", "list", "--root", str(file))[0] == 3
    full = refused(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert isinstance(full, NoRoom) and str(full) == "/x: No space left on device: make room there"
    assert "as root" in str(refused(PermissionError(errno.EACCES, "Permission denied", "/x")))


def test_no_agent(run: Run, root: Path) -> None:
    assert run("site", "init", "oslo", "--address", f"127.0.0.1:{free_port()}", "--root", str(root))[0] == 0
    code, _, err = run("guest", "list", "--root", str(root))
    assert code == 8 and "is 'haulier agent' running there?" in err


def test_init_twice_and_badly(run: Run, root: Path) -> None:
    assert run("site", "init", "Oslo!", "--address", "h:1", "--root", str(root))[0] == 2
    assert run("site", "init", "oslo", "--address", "nowhere", "--root", str(root))[0] == 2
    code, out, _ = run("site", "init", "oslo", "--address", "h:1", "--bulk", "10.0.0.1", "--bulk", "10.1.0.1",
                       "--root", str(root), "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["bulk"] == ["10.0.0.1", "10.1.0.1"]
    assert run("site", "init", "oslo", "--address", "h:1", "--root", str(root))[0] == 4


def test_join_with_the_token_that_was_printed(run: Run, agent: Agent, root: Path) -> None:
    code, token, _ = run("site", "token")
    assert code == 0
    via = agent.site.control
    words = ("--via", via, "--token", token.strip(), "--address", f"127.0.0.1:{free_port()}")
    assert run("site", "join", "lisbon", *words, "--root", str(root.parent / "l"))[0] == 0
    code, _, err = run("site", "join", "porto", *words, "--root", str(root.parent / "p"))
    assert code == 9 and "used already" in err
    code, out, _ = run("site", "list")
    assert code == 0 and "lisbon" in out and "this site" in out
    assert run("site", "token", "--minutes", "0")[0] == 2
    assert run("site", "token", "--root", str(root.parent / "l"))[0] == 5


def test_errors_as_json(run: Run, agent: Agent) -> None:
    code, out, err = run("guest", "show", "web1", "--json")
    assert code == 3 and json.loads(out) == {"error": json.loads(out)["error"], "code": 3} and err == ""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("guest", "run", "web1", "--image", "nix"), 3),
        (("guest", "run", "web1", "--image", "nix", "--memory", "lots"), 2),
        (("guest", "run", "Web 1", "--image", "nix"), 2),
        (("guest", "stop", "web1"), 3),
        (("guest", "remove", "../x"), 2),
        (("image", "import", "/nonexistent"), 3),
        (("image", "warm", "nix"), 3),
        (("image", "remove", "nix"), 3),
        (("handoff", "web1", "--to", "lisbon"), 3),
        (("plan", "web1", "--to", "lisbon"), 3),
        (("status", "web1"), 3),
        (("cancel", "web1"), 3),
        (("verify", "web1"), 3),
        (("gc",), 0),
        (("status",), 0),
        (("guest", "list"), 0),
        (("image", "list"), 0),
    ],
)
def test_exit_codes(run: Run, agent: Agent, words: tuple[str, ...], code: int) -> None:
    assert run(*words)[0] == code
    assert run(*words, "--json")[0] == code


def test_json_is_one_object_a_line(run: Run, agent: Agent) -> None:
    for words in (
        ("guest", "list"),
        ("image", "list"),
        ("status",),
        ("site", "list"),
        ("gc", "--dry-run"),
        ("doctor",),
    ):
        for line in run(*words, "--json")[1].splitlines():
            assert isinstance(json.loads(line), dict)


def ended(agent: Agent, outcome: str, detail: dict[str, Any], report: dict[str, Any]) -> None:
    agent.journal.advance("web1", "absent", "owner", epoch=1, wanted="running")
    agent.journal.add_handoff(
        HandoffRow("h1", "web1", "source", "lisbon", state="ended", outcome=outcome, epoch=2, detail=detail, ended=1.0)
    )
    directory = agent.site.handoff_root("h1")
    directory.mkdir()
    (directory / "report.json").write_text(json.dumps(report))


def test_status_of_one(run: Run, agent: Agent) -> None:
    wire = {"sent": 1_500_000, "received": 10}
    report = {"total_s": 8.25, "downtime_ms": 97.4, "wire": wire, "phases": [{"name": "disk", "seconds": 1}]}
    ended(agent, "done", {}, report)
    code, out, _ = run("status", "web1")
    assert code == 0
    assert "guest web1 runs at lisbon (epoch 2): 8.2 s, 97 ms of downtime, 1.5 MB on the wire" in out
    assert "phase disk" in out
    assert json.loads(run("status", "h1", "--json")[1])["report"] == report
    assert "done" in run("status")[1]


@pytest.mark.parametrize(("outcome", "code"), [("failed", 12), ("cancelled", 11), ("failed", 6)])
def test_a_handoff_ends_with_the_code_of_its_error(
    run: Run, agent: Agent, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    ended(agent, outcome, {"error": "because; the guest runs on at 'oslo'", "code": code}, {})
    monkeypatch.setattr(agent.handoffs, "start", lambda request: agent.handoffs.show("h1"))
    got, _, err = run("handoff", "web1", "--to", "lisbon")
    assert got == code and "the guest runs on at 'oslo'" in err
    got, out, err = run("handoff", "web1", "--to", "lisbon", "--json")
    assert got == code and json.loads(out.splitlines()[-1])["outcome"] == outcome


def test_what_a_peer_says_does_not_steer_the_terminal(run: Run, agent: Agent) -> None:
    ended(agent, "failed", {"error": "\x1b[2Jgone [red]x[/red]", "code": 12}, {})
    out = run("status", "h1")[1]
    assert "\x1b" not in out and "[red]x[/red]" in out


def test_exit_codes_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    todo: list[type[HaulierError]] = [HaulierError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__ == "haulier.errors":
            assert f"| {kind.exit_code} |" in text, kind
    for verb in VERBS:
        assert f"haulier {verb}" in text, verb


def test_a_paths_line_says_what_it_carried_and_what_became_of_it() -> None:
    from haulier.cli.status import path_rows

    path = {"name": "wan0>192.0.2.1:7", "up": True, "acked": 3_000_000, "rate_bps": 9.6e6, "rtt_s": 0.021, "loss": 0.01}
    dear = {**path, "name": "wan1>192.0.2.5:7", "cap_bps": 5e6, "cost": 10, "held": True}
    report = {"wire": {"transport": "striping over 2 paths", "paths": [path, dear, {**path, "name": "x", "up": False}]}}
    rows = dict(path_rows(report, None))
    assert rows["transport"] == "striping over 2 paths"
    assert rows["path wan0>192.0.2.1:7"] == "3.0 MB, 9.6 Mbit/s, 21 ms, 1.0 % sent again"
    assert str(rows["path wan1>192.0.2.5:7"]).endswith(", at most 5 Mbit/s, cost 10, in reserve")
    assert str(rows["path x"]).endswith(", down")
    without = {**report, "waypoints": {"porto": "", "bergen": "does not answer"}}
    assert dict(path_rows(without, None))["nothing went through bergen"] == "does not answer"
    assert "nothing went through porto" not in dict(path_rows(without, None))
    assert path_rows(None, None) == [] == path_rows({}, {"paths": []})
    assert dict(path_rows(None, report["wire"]))["transport"] == "striping over 2 paths", "while it goes on"


def test_a_guests_addresses_are_sorted_by_family() -> None:
    assert by_family([], []) == {"address": "", "address6": "", "gateway": "", "gateway6": ""}
    assert by_family(["auto"], [])["address"] == "auto"
    both = by_family(["fd77::10/64", "10.77.0.10/24"], ["fd77::1"])
    assert (both["address"], both["address6"]) == ("10.77.0.10/24", "fd77::10/64")
    assert (both["gateway"], both["gateway6"]) == ("", "fd77::1")
    alone = by_family(["fd77::10/64"], ["fd77::1"])
    assert (alone["address"], alone["gateway"]) == ("fd77::10/64", "fd77::1") and not alone["address6"]
    with pytest.raises(UsageError, match="give one, or one of IPv4"):
        by_family(["10.77.0.10/24", "10.77.0.11/24"], [])
