"""`haulier lab` as a person types it: output, JSON and exit codes of real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.cli.lab import describe
from haulier.lab.lab import take_down
from haulier.lab.shaper import Shape
from tests.support.labs import own_name, sweep

TEXT = """
name = "t-cli"
[[site]]
name = "oslo"
guest_gateway = "10.77.0.1/24"
[[site]]
name = "client"
[[link]]
a = "oslo"
b = "client"
rate = "10mbit"
delay = "5ms"
"""


def haulier(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", "from haulier.cli import main; main()", "lab", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def facts(*words: str) -> Any:
    done = haulier(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_shapes_in_words() -> None:
    assert describe(Shape()) == "unlimited, 0 ms"
    assert describe(Shape(up=False, rate_bps=1e6)) == "down"
    shape = Shape(rate_bps=2.5e6, delay_s=0.025, jitter_s=0.002, loss=0.005)
    assert describe(shape) == "2.5 Mbit/s, 25 ms ± 2 ms, loss 0.5 %, queue 48 kB"


def test_bad_words_have_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('name = "x"')
    for words, message in (
        (["up", str(file)], "1 to 200 sites"),
        (["up", str(tmp_path / "none.toml")], "cannot read topology"),
        (["route", "client"], "three or four words"),
        (["down", "../x"], "lower-case"),
    ):
        done = haulier(*words)
        assert done.returncode == 2
        assert message in done.stderr
    assert haulier("status", "no-such-lab").returncode == 3


needs_root = pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and TUN")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    sweep()
    file = tmp_path_factory.mktemp("lab") / "lab.toml"
    file.write_text(own_name(TEXT))
    name = name_of(file)
    try:
        assert haulier("up", str(file)).returncode == 0
        yield file
    finally:
        take_down(name)


def name_of(file: Path) -> str:
    return file.read_text().split('"')[1]


@pytest.mark.root
@needs_root
def test_up_twice_says_what_to_do(file: Path) -> None:
    done = haulier("up", str(file))
    assert done.returncode == 4
    assert f"haulier lab down {name_of(file)}" in done.stderr
    assert "--force" in done.stderr


@pytest.mark.root
@needs_root
def test_status_names_everything(file: Path) -> None:
    told = facts("status", name_of(file))
    assert told["backend"] in ("tun", "netem")
    assert set(told["sites"]) == {"oslo", "client"}
    assert told["links"]["oslo-client"]["a_to_b"]["rate_bps"] == 10e6
    assert told["links"]["oslo-client"]["alive"] is True
    assert name_of(file) in [entry["lab"] for entry in facts("status")["labs"]]
    said = haulier("status", name_of(file)).stdout
    assert "oslo -> client: 10 Mbit/s, 5 ms, queue 48 kB" in said
    assert "guests behind 10.77.0.1/24" in said


@pytest.mark.root
@needs_root
def test_set_changes_one_direction(file: Path) -> None:
    lab = name_of(file)
    told = facts("set", "oslo-client", "--lab", lab, "--from", "oslo", "--rate", "3mbit", "--loss", "1%", "--down")
    assert told["a_to_b"] == {
        "rate_bps": 3e6,
        "delay_s": 0.005,
        "jitter_s": 0.0,
        "loss": 0.01,
        "queue_bytes": 48000,
        "up": False,
    }
    assert told["b_to_a"]["rate_bps"] == 10e6
    told = facts("set", "oslo-client", "--lab", lab, "--rate", "10mbit", "--loss", "0", "--up")
    assert told["a_to_b"] == told["b_to_a"]
    done = haulier("set", "oslo-client", "--lab", lab, "--rate", "fast")
    assert done.returncode == 2
    assert 'give a rate like "10mbit"' in done.stderr


@pytest.mark.root
@needs_root
def test_exec_is_the_command(file: Path) -> None:
    lab = name_of(file)
    done = haulier("exec", "--lab", lab, "oslo", "--", "ip", "-br", "addr", "show", "br0")
    assert "10.77.0.1/24" in done.stdout
    assert haulier("exec", "--lab", lab, "oslo", "--", "sh", "-c", "exit 7").returncode == 7
    done = haulier("exec", "--lab", lab, "rome", "true")
    assert done.returncode == 2
    assert "it has oslo, client" in done.stderr


@pytest.mark.root
@needs_root
def test_route(file: Path) -> None:
    lab = name_of(file)
    assert facts("route", lab, "client", "10.77.0.10", "oslo")["via"] == "oslo"
    done = haulier("exec", "--lab", lab, "client", "--", "ip", "route", "show", "10.77.0.10")
    assert "dev wan0" in done.stdout


@pytest.mark.root
@needs_root
def test_down_is_fine_twice(file: Path) -> None:
    assert facts("down", str(file)) == {"down": name_of(file)}
    assert haulier("down", name_of(file)).returncode == 0
    assert haulier("status", name_of(file)).returncode == 3
