"""Reading processes' memory, where pages lie in the picture, when to freeze, and what stands against a handoff."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from haulier.containers.bundle import config, criu_options
from haulier.containers.convergence import LEAST_S, MOST_ROUNDS, Round, Rounds
from haulier.containers.memory import (
    FRAME,
    Places,
    Reserve,
    areas_of,
    changed_copies,
    kernel_pages,
    picture_pages,
    read_processes,
)
from haulier.containers.model import ContainerSpec, ImageConfig, parse_user
from haulier.containers.preflight import differences, explain, host_facts, scan
from haulier.errors import Corrupt, NoRoom, Unsupported, UsageError
from haulier.memory.picture import PICTURE, PictureSource
from haulier.memory.target_proxy import TargetProxy
from haulier.units import MIB, PAGE
from tests.support.waiting import wait_for

CHILD = """
import mmap, sys, time
private = bytearray(b"private " * 51200)
shared = mmap.mmap(-1, 40960)
shared[:16] = b"shared with all "
print(hex(id(private)), flush=True)
sys.stdin.readline()
private[:8] = b"changed "
print("ok", flush=True)
time.sleep(1e6)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def everything(pid: int) -> dict[tuple[tuple[str, int], int], bytes]:
    return {
        (piece.key, page): contents.tobytes()
        for piece in read_processes(areas_of([pid]))
        for page, contents in zip(piece.pages.tolist(), piece.contents, strict=True)
    }


@pytest.mark.root
def test_pages_of_programs_are_found_as_their_files_have_them(child: subprocess.Popen[str]) -> None:
    now = everything(child.pid)
    alike = pages = 0
    for changed in changed_copies(areas_of([child.pid])):
        piece = changed.original()
        assert len(piece.pages) == len(changed.at) == len(piece.contents)
        for page, was, at in zip(piece.pages.tolist(), piece.contents, changed.at.tolist(), strict=True):
            with open(changed.path, "rb") as file:
                file.seek(at * PAGE)
                assert file.read(PAGE).ljust(PAGE, b"\0") == was.tobytes()
            is_now = np.frombuffer(now[(piece.key, page)], np.uint8)
            pages += 1
            alike += int((is_now == was).mean() > 0.5)
    # Data of programs is mostly as it was, or this would be of no use.
    assert pages > 10
    assert alike > pages / 2


def test_what_the_kernel_puts_into_a_process_is_a_program() -> None:
    assert kernel_pages()[:4] == b"\x7fELF" and len(kernel_pages()) % PAGE == 0


@pytest.mark.root
def test_memory_of_a_running_process_is_read_as_it_is(child: subprocess.Popen[str]) -> None:
    before = everything(child.pid)
    assert sum(b"private private" in page for page in before.values()) >= 99
    shared = [page for (kind, _), page in before.items() if kind[0] == "s"]
    assert any(page.startswith(b"shared with all ") for page in shared)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    child.stdout.readline()
    after = everything(child.pid)
    changed = [key for key in after if after[key] != before.get(key)]
    assert any(b"changed private" in after[key] for key in changed)
    assert 0 < len(changed) < len(after) // 4


@pytest.mark.root
def test_a_process_that_is_gone_is_left_out(child: subprocess.Popen[str]) -> None:
    child.kill()
    wait_for(lambda: child.poll() is not None, 10)
    assert list(read_processes(areas_of([child.pid]))) == []


def test_a_page_keeps_its_place() -> None:
    places = Places(64 * FRAME)
    some = np.array([100, 101, 5000, 102], np.int64)
    first = places.numbers(("p", 1), some)
    other = places.numbers(("p", 2), some)
    assert len({*first.tolist(), *other.tolist()}) == 8
    assert first[1] - first[0] == 1
    back = Places.decode(places.encode(), 64 * FRAME)
    assert back.numbers(("p", 1), some).tolist() == first.tolist()
    fresh = back.numbers(("s", 9), some[:1])
    assert not {*fresh.tolist()} & {*first.tolist(), *other.tolist()}
    with pytest.raises(NoRoom):
        places.numbers(("p", 3), np.arange(64, dtype=np.int64) * FRAME)
    with pytest.raises(Corrupt):
        Places.decode(b"nonsense", 64)


def test_both_ends_have_the_same_picture(tmp_path: Path) -> None:
    source = PictureSource(tmp_path / "a", 4096, None, None)
    target = TargetProxy(tmp_path / "b", max_memory=4096 * PAGE)
    target.feed(source.begin().data)
    chosen = np.random.default_rng(3)
    pages = chosen.integers(0, 255, (300, PAGE), dtype=np.uint8)
    pages[7] = 0
    numbers = chosen.permutation(4096)[:300].astype(np.int64)
    for batch in source.send(numbers, pages):
        target.feed(batch.data)
    assert source.differing(numbers, pages).tolist() == []
    pages[11, 50] ^= 1
    pages[12] = 0
    assert source.differing(numbers, pages).tolist() == [11, 12]
    for batch in source.send(numbers[11:13], pages[11:13]):
        target.feed(batch.data)
    assert target.mirror is not None and list(target.mirror.blocks) == [PICTURE]
    assert (target.mirror.view[numbers] == pages).all()
    assert target.digest() == source.digest() and target.raw_bytes == source.counters.raw_bytes
    source.close()
    target.close()


# -- when to freeze --------------------------------------------------------------------------------------------------


def test_it_is_frozen_when_the_last_transfer_is_short() -> None:
    rounds = Rounds(0.3)
    assert rounds.add(Round(10.0, 100_000_000, 80e6)) is False
    assert rounds.add(Round(2.0, 8_000_000, 80e6)) is False
    assert rounds.add(Round(0.2, 100_000, 80e6)) is True
    assert rounds.forecast < max(LEAST_S, 0.075)


def test_rounds_that_do_not_get_shorter_end() -> None:
    rounds = Rounds(0.3)
    done = [rounds.add(Round(5.0, 40_000_000, 80e6)) for _ in range(4)]
    assert done == [False, False, True, True]


def test_there_is_an_end_in_any_case() -> None:
    rounds = Rounds(0.3)
    size = 1e12
    for _ in range(MOST_ROUNDS - 1):
        size *= 0.84
        assert rounds.add(Round(5.0, int(size), 1e6)) is False
    assert rounds.add(Round(5.0, int(size), 1e6)) is True


# -- preflight -------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_open_files_tell_what_cannot_be_dumped() -> None:
    assert scan([os.getpid()]) == [] or all("process" in text for text in scan([os.getpid()]))
    try:
        odd = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    with odd:
        (found,) = scan([os.getpid()])
    assert "MPTCP" in found and "GODEBUG" in found


def test_what_criu_says_is_explained() -> None:
    assert "io_uring" in explain("Error (criu/files.c:1): can't send_fds")
    assert "limits" in explain("Can't get rlimit 0: Operation not permitted")
    assert explain("Error: something new").endswith("something new")


def test_two_hosts_are_compared() -> None:
    try:
        mine = host_facts()
    except Unsupported:
        pytest.skip("no runc or CRIU here")
    assert differences(mine) == []
    assert "avx1024" in differences(mine | {"cpu": mine["cpu"] + " avx1024"})[0]
    assert "older" in differences(mine | {"kernel": "99.1.0"})[0]
    assert "CRIU" in differences(mine | {"criu": "3.17"})[0]


# -- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": (0,)},
        {"layers": (1,) * 40},
        {"command": ()},
        {"command": ("a\0b",)},
        {"command": ("x" * 200_000,)},
        {"env": ("NOVALUE",)},
        {"cwd": "relative"},
        {"uid": -1},
    ],
)
def test_specs_from_elsewhere_are_checked(changes: dict[str, object]) -> None:
    good: dict[str, object] = {"layers": (3, 4), "command": ("sleep", "1")}
    assert ContainerSpec(**good).lower_chunks == 7  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        ContainerSpec(**(good | changes))  # type: ignore[arg-type]


def test_users_and_configs() -> None:
    assert parse_user("") == (0, 0) and parse_user("33:44") == (33, 44) and parse_user("7") == (7, 0)
    with pytest.raises(UsageError):
        parse_user("www-data")
    oci = ImageConfig.from_oci({"Entrypoint": ["a"], "Cmd": ["b"], "Env": ["X=1"], "User": "5"})
    assert oci == ImageConfig(command=("a", "b"), env=("X=1",), user="5")
    assert ImageConfig(command=("c",)).over(oci).command == ("c",)
    with pytest.raises(UsageError):
        ImageConfig.from_oci({"Cmd": [1]})


def test_the_runtime_gets_what_the_spec_says() -> None:
    spec = ContainerSpec(layers=(1,), command=("prog", "--x"), env=("A=1",), cwd="/srv", uid=5, gid=6)
    facts = {"hostname": "h", "memory_mib": 64, "vcpus": 2, "netns": "/n", "cgroup": "/c", "criu": "/o"}
    made = config(spec, shell=False, **facts)  # type: ignore[arg-type]
    assert made["process"]["args"] == ["prog", "--x"] and made["process"]["user"] == {"uid": 5, "gid": 6}
    assert {"type": "network", "path": "/n"} in made["linux"]["namespaces"]
    assert made["linux"]["resources"]["memory"]["limit"] == 64 << 20
    wrapped = config(spec, shell=True, **facts)  # type: ignore[arg-type]
    assert wrapped["process"]["args"][-2:] == ["prog", "--x"] and wrapped["process"]["args"][0] == "/bin/sh"
    assert "leave-stopped" in criu_options(restoring=True) and "leave-stopped" not in criu_options(restoring=False)
    assert picture_pages(64) == picture_pages(1) and picture_pages(4096) == 4 * 4096 * 256


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_a_reserve_has_its_memory_at_once_and_gives_it_back() -> None:
    before = resident()
    reserve = Reserve(64 * MIB)
    assert resident() - before > 60 * MIB
    reserve.release()
    reserve.release()
    assert resident() - before < 32 * MIB
