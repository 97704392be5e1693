"""Containers go there and back with their clients connected; whatever fails, one site runs them and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from haulier.chunks.store import ChunkStore
from haulier.containers import lxc, sockets
from haulier.containers.criu import find_criu, self_test
from haulier.containers.importing import layers_of
from haulier.containers.layers import make_layers
from haulier.containers.model import ContainerSpec
from haulier.containers.network import RUN
from haulier.errors import Cancelled, HaulierError, Unsupported
from haulier.guests.tap import BRIDGE
from haulier.handoff.residence import adopt_container
from haulier.lab.container_clients import Download, Player, Redis, Talk
from haulier.lab.containers import VIDEO_BYTES, ContainerTemplate, container_template
from haulier.lab.scenario import GATEWAY, GUEST_ADDRESS, Filled, Template, scenario, wan
from tests.support.waiting import until_none, wait_for
from tests.system.stage import Handoff, Stage, alive

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.timeout(300)]
HOST = GUEST_ADDRESS.partition("/")[0]


class ContainerStage(Stage):
    """A stage whose guests are containers, one at a time at GUEST_ADDRESS."""

    def run_container(self, name: str, image: str, *words: str, memory: str = "256M") -> None:
        self.scenario.oslo.facts(
            *("guest", "run", name, "--image", image, "--kind", "container", "--memory", memory),
            *("--address", GUEST_ADDRESS, *words),
        )
        self.addresses[name] = GUEST_ADDRESS
        self.scenario.route("oslo")

    def end_container(self, name: str) -> None:
        """The guest goes for good, at both sites, and nothing of it is left."""
        # Twice: the second time what is known of its epochs goes as well, so that the name may begin anew.
        for site in ("oslo", "lisbon", "oslo", "lisbon"):
            with contextlib.suppress(HaulierError):
                self.site(site).haulier("guest", "remove", name, "--force")
        del self.addresses[name]
        for site in ("oslo", "lisbon"):
            assert self.of_guest(site, name) == []
            assert self.traces(site) == []

    def traces(self, site: str) -> list[str]:
        """Namespaces, mounts and control groups of containers of a site that owns none."""
        root = str(self.site(site).root)
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if root in line]
        states = self.site(site).root / "run" / "runc"
        return mounts + [str(path) for path in (states.iterdir() if states.exists() else ())]

    def assert_moved(self, handoff: Handoff, home: str) -> None:
        """The guest is at `home`, and of the handoff nothing else is left at either site."""
        other = self.scenario.other(home).name

        def left() -> list[str]:
            found = self.of_handoff(home, handoff.id) + self.of_handoff(other, handoff.id)
            found += self.of_guest(other, handoff.guest) + self.traces(other)
            return found + [str(path) for site in (home, other) for path in self.site(site).site.ram_dir.glob("*")]

        found = until_none(left, 120)
        assert found == [], f"{found}\n{handoff.logs()}"
        # runc and its processes are in namespaces of their own; nothing else works on the site's directory.
        assert self.processes(home) == [] and self.processes(other) == []
        assert self.home(handoff.guest) == home

    def go(self, name: str, *options: str) -> dict[str, Any]:
        """A handoff to the other site that has to succeed; its report."""
        handoff = self.begin(name, *options)
        report = handoff.done()
        self.assert_moved(handoff, handoff.target)
        figures = {key: report[key] for key in ("total_s", "downtime_ms", "trial_ms", "switchover_ms")}
        print(json.dumps(figures | {"sent": report["wire"]["sent"]}))
        return report


def segments(standing: ContainerStage, name: str) -> list[int]:
    """Bytes in the largest segment of each of a container's connections."""
    container = adopt_container(standing.site(standing.home(name)).site, name)
    assert container is not None
    found = []
    for pid, number in sockets.talking(container.pids()):
        with sockets.borrowed(pid, number) as sock:
            # linux/tcp.h: tcpi_snd_mss comes after eight bytes and two numbers.
            found.append(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 20), 16)[0])
    return found


def namespaces() -> set[str]:
    return {path.name for path in RUN.glob("hc-*")} if RUN.exists() else set()


@pytest.fixture(scope="module")
def template() -> ContainerTemplate:
    try:
        problem = self_test(find_criu().path)
    except Unsupported as error:
        problem = str(error)
    if problem:
        pytest.skip(f"containers cannot be handed over on this machine: {problem}")
    return container_template()


@contextlib.contextmanager
def container_stage(made: Filled, name: str, links: list[str]) -> Iterator[ContainerStage]:
    before = namespaces()
    with scenario(f"ct-{name}", made, links) as found:
        yield ContainerStage(found)
    assert namespaces() == before, "a network namespace was left behind"


@pytest.fixture(scope="module")
def running(template: ContainerTemplate) -> Iterator[ContainerStage]:
    with container_stage(template, "main", [wan("100mbit", "10ms")]) as standing:
        yield standing


@pytest.fixture
def standing(running: ContainerStage) -> Iterator[ContainerStage]:
    """Both agents up and the link too, and no guest, whatever the test before did."""
    with contextlib.suppress(Exception):
        running.set_link(up=True)
    for site in running.scenario.sites.values():
        if site.agent is None:
            site.start_agent()
    for name in list(running.addresses):
        running.end_container(name)
    yield running


# -- there and back --------------------------------------------------------------------------------------------------


def test_a_game_goes_there_and_back_with_its_players(standing: ContainerStage) -> None:
    standing.run_container("game1", "game", memory="128M")
    player = Player(standing.scenario.lab, "client", HOST)
    talk = Talk(standing.scenario.lab, "client", HOST)
    try:
        pid = talk.ask("ping")["pid"]
        nice = os.getpriority(os.PRIO_PROCESS, standing.site("oslo").client.guest("game1")["pid"])
        wait_for(lambda: len(player.ticks) > 20 and len(player.udp) > 2, 30)
        reports = []
        plan = standing.site("oslo").facts("plan", "game1", "--to", "lisbon")
        assert plan["reasons"] == [] and 0 < plan["downtime_ms"]["likely"] < 5000 and plan["bytes"]["total"] > 1e5
        for _ in range(2):
            began = time.monotonic()
            reports.append(standing.go("game1", "--check"))
            heard = len(player.ticks), len(player.udp)
            wait_for(lambda heard=heard: len(player.ticks) > heard[0] + 10 and len(player.udp) > heard[1], 30)
            print("gap", round(player.gap(began), 3))
            assert talk.ask("ping")["pid"] == pid, "the same process, over the same connection"
        # What worked for it while it stood still went before others; it does not do so itself.
        assert os.getpriority(os.PRIO_PROCESS, standing.site("oslo").client.guest("game1")["pid"]) == nice
        assert player.wrong() == []
        assert [report["check"]["memory_equal"] for report in reports] == [True, True]
        assert [report["epoch"] for report in reports] == [2, 3]
        there, back = (report["wire"]["sent"] + report["wire"]["received"] for report in reports)
        assert back < there / 3
        # What it wrote is whole: a line each second, none lost on the way.
        root = Path(standing.site("oslo").client.guest("game1")["root_files"])
        lines = [int(line) for line in (root / "var/log/game.log").read_text().split()]
        assert lines == list(range(20, 20 * len(lines) + 1, 20)) and len(lines) > 3
        verify = standing.site("oslo").facts("verify", "game1")
        assert verify["ok"] is True and verify["chunks"] > 1000
    finally:
        player.close()
        talk.close()


def test_a_small_one_goes_over_the_connection_of_its_offer(standing: ContainerStage) -> None:
    standing.run_container("idle1", "base", "--command", "sleep 1000000")
    reports, crossed = [], []
    for _ in range(2):
        before = standing.scenario.wan_bytes()
        reports.append(standing.go("idle1"))
        crossed.append(standing.scenario.wan_bytes() - before)
    print(crossed)
    for report in reports:
        up = {path["name"]: path["sent"] for path in report["wire"]["paths"] if path["up"]}
        assert len(up) == 1 and next(iter(up)).endswith("(handed over)"), report["wire"]
        assert sum(path["sent"] for path in report["wire"]["paths"]) == sum(up.values()) > 0, "nothing was dialled"
        assert abs(report["clock_offset_s"]) < 1
    assert crossed[1] < 10_000, "two handshakes alone would be 4300 of them"


def test_redis_keeps_every_acknowledged_write(standing: ContainerStage) -> None:
    standing.run_container("redis1", "redis")
    redis = Redis(standing.scenario.lab, "client", HOST)
    try:
        redis.fill(200_000)
        redis.write_on()
        for _ in range(2):
            before = redis.acknowledged
            standing.go("redis1")
            wait_for(lambda before=before: redis.acknowledged > before + 20 or redis.errors, 30)
            assert redis.errors == []
        redis.stop_writing()
        assert redis.call("DBSIZE") == 200_000 + redis.acknowledged
        assert redis.lost() == []
        assert redis.call("GET", "key:199999") == "value:199999"
    finally:
        redis.close()


def test_a_download_goes_on_while_its_server_moves_there_and_back(standing: ContainerStage) -> None:
    standing.run_container("video1", "video")
    download = Download(standing.scenario.lab, "client", HOST, "/video")
    try:
        wait_for(lambda: download.received > 5e6 or download.error, 60)
        for _ in range(2):
            report = standing.go("video1")
            assert report["wire"]["sent"] < 20e6, "the file was at the target already"
            at = download.received
            assert 0 < at < VIDEO_BYTES, "it was still under way"
            wait_for(lambda at=at: download.received > at + 1e6 or download.error, 30)
            assert segments(standing, "video1") == [1448], "as large as before the move"
        download.wait(120)
        assert download.error == ""
        chosen = random.Random(3)
        hasher = hashlib.sha256()
        for _ in range(VIDEO_BYTES >> 20):
            hasher.update(chosen.randbytes(1 << 20))
        assert download.digest == hasher.hexdigest() and download.received == VIDEO_BYTES
    finally:
        download.close()


def test_110_mb_of_random_memory_that_changes(standing: ContainerStage) -> None:
    standing.run_container("memory1", "memory")
    talk = Talk(standing.scenario.lab, "client", HOST)
    try:
        wait_for(lambda: talk.ask("state")["written"] > 100, 60)
        reports = [standing.go("memory1"), standing.go("memory1")]
        found = talk.ask("check")
        assert found["bad"] == 0 and found["pages"] == 110 * 256
        assert reports[0]["wire"]["sent"] < 125e6
        assert reports[1]["wire"]["sent"] < 5e6, "the way back sends what changed"
        assert max(entry["sent"] for entry in reports[1]["memory"]["rounds"]) < 28_160 // 4
    finally:
        talk.close()


@pytest.fixture
def of_lxc(standing: ContainerStage, tmp_path: Path) -> Iterator[str]:
    """A game that LXC runs at oslo, made with LXC's own tools; where LXC has it."""
    if not lxc.installed():
        pytest.skip("LXC's tools are not on this machine")
    lab, oslo = standing.scenario.lab, standing.site("oslo").site
    with ChunkStore(oslo.store) as store:
        manifest, meta = store.load_manifest("image/game"), store.manifest_meta("image/game")
        layers = make_layers(oslo.layers, store, ContainerSpec(layers=layers_of(meta).layers, command=("x",)), manifest)
    folder, root = tmp_path / "lxc", tmp_path / "lxc/ours/rootfs"
    for path in (root, folder / "upper", folder / "work"):
        path.mkdir(parents=True)
    lower = ":".join(str(path) for path in reversed(layers))
    options = f"lowerdir={lower},upperdir={folder}/upper,workdir={folder}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
    (folder / "ours/config").write_text(
        f"lxc.rootfs.path = dir:{root}\nlxc.uts.name = ours\nlxc.net.0.type = veth\nlxc.net.0.veth.pair = lxcours\n"
        "lxc.net.0.flags = up\nlxc.net.0.name = eth0\n"
        f"lxc.net.0.ipv4.address = {GUEST_ADDRESS}\nlxc.net.0.ipv4.gateway = {GATEWAY.partition('/')[0]}\n"
        "lxc.init.cmd = /usr/bin/python3 -u /srv/services.py game\nlxc.console.path = none\nlxc.tty.max = 0\n"
        "lxc.pty.max = 16\nlxc.mount.auto = proc:rw sys:ro\n"
    )
    lab.exec("oslo", ["lxc-start", "-P", str(folder), "-n", "ours", "-d"])
    # By hand, for LXC looks for bridges in /sys, which shows those of another namespace than the lab's.
    lab.exec("oslo", ["ip", "link", "set", "dev", "lxcours", "master", BRIDGE])
    standing.scenario.route("oslo")
    yield str(folder)
    lab.exec("oslo", ["lxc-stop", "-k", "-P", str(folder), "-n", "ours"], check=False)
    subprocess.run(["umount", str(root)], check=True)


@pytest.mark.full
def test_a_container_of_lxc_is_taken_over_and_goes_there_and_back(standing: ContainerStage, of_lxc: str) -> None:
    oslo, lisbon = standing.site("oslo"), standing.site("lisbon")
    player = Player(standing.scenario.lab, "client", HOST)
    talk = Talk(standing.scenario.lab, "client", HOST)
    try:
        wait_for(lambda: len(player.ticks) > 5, 30)
        words = ["--lxc", "ours", "--lxc-path", of_lxc, "--memory", "128M", "--address", GUEST_ADDRESS]
        facts = oslo.facts("guest", "adopt", "game2", *words)
        standing.addresses["game2"] = GUEST_ADDRESS
        assert facts["accel"] == "lxc" and facts["status"] == "running"
        pid = talk.ask("ping")["pid"]
        for target, other in ((lisbon, oslo), (oslo, lisbon)):
            handoff = standing.begin("game2")
            report = handoff.done()
            print(json.dumps({key: report[key] for key in ("total_s", "downtime_ms", "trial_ms", "switchover_ms")}))
            heard = len(player.ticks)
            wait_for(lambda heard=heard: len(player.ticks) > heard + 10, 30)
            assert talk.ask("ping")["pid"] == pid, "the same process, over the same connection"
            # LXC's own tools know it there, and no more where it was.
            # Asked in the site's namespace: LXC listens on a socket that only that one has.
            folder = str(target.site.guests / "game2/lxc")
            listed = standing.scenario.lab.exec(target.name, ["lxc-info", "-P", folder, "-n", "game2", "-s", "-H"])
            assert listed.stdout.strip() == "RUNNING"
            wait_for(lambda gone=other.site.guests / "game2": not gone.exists(), 30)
        assert player.wrong() == []
        assert not Path(of_lxc, "ours/config").exists(), "it must not be started again where it was taken over"
        root = Path(oslo.client.guest("game2")["root_files"])
        lines = [int(line) for line in (root / "var/log/game.log").read_text().split()]
        assert lines == list(range(20, 20 * len(lines) + 1, 20)) and len(lines) > 3
        assert oslo.facts("guest", "stop", "game2", "--force")["status"] == "stopped"
        assert oslo.facts("guest", "start", "game2")["status"] == "running"
    finally:
        player.close()
        talk.close()


@pytest.mark.full
def test_faces_are_found_before_and_after(tmp_path: Path) -> None:
    made = container_template(faces=True)
    with container_stage(made, "faces", [wan("100mbit", "10ms")]) as standing:
        standing.run_container("faces1", "faces", memory="512M")
        talk = Talk(standing.scenario.lab, "client", HOST)
        before = [talk.ask("detect", seed=seed) for seed in range(3)]
        assert before[0]["faces"]
        for _ in range(2):
            standing.go("faces1")
            after = [talk.ask("detect", seed=seed) for seed in range(3)]
            assert [(one["faces"], one["image"]) for one in after] == [(one["faces"], one["image"]) for one in before]
        talk.close()


@dataclass(frozen=True)
class Each:
    """What each site starts from."""

    sites: dict[str, Filled]

    def copy_to(self, root: Path) -> None:
        self.sites[root.name].copy_to(root)


@pytest.mark.full
@pytest.mark.qemu
def test_containers_and_disks_of_one_distribution_share_what_they_have_in_common(
    template: ContainerTemplate, made: Template
) -> None:
    """No guest runs: images go from one site, which has containers, to another, which has virtual machines."""
    with scenario("ct-shared", Each({"oslo": template, "lisbon": made}), [wan("1gbit", "1ms")]) as both:
        oslo, lisbon = both.oslo, both.lisbon
        alone = oslo.facts("image", "push", "base", "--to", "lisbon", timeout=200)["items"][0]
        lisbon.haulier("image", "remove", "base")
        lisbon.haulier("gc", timeout=200)
        with ChunkStore(oslo.site.store) as store:
            chunks = len(store.load_manifest("image/base").unique())
        # Whole chunks are the same by luck of where a file lies on the disk, and even so there are some.
        assert 0 < alone["lacking"] < chunks - 100
        lisbon.facts("image", "push", "debian", "--no-warm", "--to", "oslo", timeout=280)
        again = oslo.facts("image", "push", "base", "--to", "lisbon", timeout=200)["items"][0]
        print(json.dumps({"chunks": chunks, "alone": alone, "both": again}))
        assert again["lacking"] <= alone["lacking"] and again["recipes"] > again["lacking"] / 3
        assert again["wire_bytes"] < alone["wire_bytes"] / 2, "blocks of the disk that both have are not sent"


# -- what fails ------------------------------------------------------------------------------------------------------


def stays(standing: ContainerStage, handoff: Handoff, player: Player, home: str = "") -> str:
    """What holds after every handoff that was cut short: one owner, its players connected, nothing left behind."""
    handoff.settled()
    found = standing.home(handoff.guest)
    assert not home or found == home, handoff.logs()
    standing.scenario.route(found)
    heard = len(player.ticks)
    wait_for(lambda: len(player.ticks) > heard + 10 or player.errors, 60)
    assert player.wrong() == []
    standing.assert_moved(handoff, found)
    return found


@pytest.fixture
def playing(standing: ContainerStage) -> Iterator[Player]:
    standing.run_container("game1", "game", memory="128M")
    player = Player(standing.scenario.lab, "client", HOST)
    wait_for(lambda: len(player.ticks) > 5, 30)
    yield player
    player.close()


def test_a_restore_that_fails_goes_back_to_the_source(
    standing: ContainerStage, playing: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "criu"
    # As CRIU does when a kernel lacks something: it says what it is, and fails when it is needed.
    broken.write_text(f'#!/bin/sh\n[ "$1" = swrk ] && exit 1\nexec {find_criu().path} "$@"\n')
    broken.chmod(0o755)
    lisbon = standing.site("lisbon")
    lisbon.kill_agent(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setenv("HAULIER_CRIU", str(broken))
        lisbon.start_agent()
    handoff = standing.begin("game1")
    code, _, err = handoff.result()
    assert code not in (0, None) and "restore" in err, err
    stays(standing, handoff, playing, home="oslo")
    lisbon.kill_agent(signal.SIGTERM)
    lisbon.start_agent()
    standing.go("game1")
    assert playing.wrong() == []


def test_cancelled_while_memory_is_sent(standing: ContainerStage, playing: Player) -> None:
    handoff = standing.begin("game1")
    handoff.wait_phase("oslo", {"memory"})
    handoff.cancel()
    code, result, err = handoff.result()
    assert code == Cancelled.exit_code and result["outcome"] == "cancelled", err
    stays(standing, handoff, playing, home="oslo")


@pytest.mark.parametrize("phase", ["memory", "switchover"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_worker_and_its_agent_killed(standing: ContainerStage, playing: Player, side: str, phase: str) -> None:
    handoff = standing.begin("game1")
    site = standing.site(getattr(handoff, side))
    handoff.wait_phase("oslo", {phase})
    handoff.kill_worker(site.name)
    site.kill_agent()
    site.start_agent()
    handoff.result()
    stays(standing, handoff, playing, home="oslo" if phase == "memory" else "")


def test_both_sides_killed_after_the_token_was_written(standing: ContainerStage, playing: Player) -> None:
    handoff = standing.begin("game1")
    handoff.wait_state("oslo", {"granted"})
    for name in ("oslo", "lisbon"):
        handoff.kill_worker(name)
        standing.site(name).kill_agent()
    for name in ("oslo", "lisbon"):
        standing.site(name).start_agent()
    handoff.result()
    stays(standing, handoff, playing, home="lisbon")
    # What it writes here is its own, whoever brought it: nothing is made anew from what came.
    lisbon = standing.site("lisbon")
    kept = Path(lisbon.client.guest("game1")["root_files"]) / "kept"
    kept.write_text("written after the move")
    assert lisbon.facts("guest", "stop", "game1", "--force")["status"] == "stopped"
    assert lisbon.facts("guest", "start", "game1")["status"] == "running"
    assert kept.read_text() == "written after the move"


def test_a_link_that_is_cut_for_a_while(standing: ContainerStage, playing: Player) -> None:
    handoff = standing.begin("game1")
    handoff.wait_phase("oslo", {"memory"})
    with standing.cut():
        # The length of the outage is what is tested; the game goes on meanwhile.
        time.sleep(6)
        assert handoff.command.poll() is None
    handoff.done()
    stays(standing, handoff, playing, home="lisbon")


# -- preflight -------------------------------------------------------------------------------------------------------

IO_URING = (
    "import ctypes,time;p=ctypes.create_string_buffer(256);"
    "fd=ctypes.CDLL(None).syscall(425,4,p);open('/said','w').write(str(fd));time.sleep(1e6)"
)
MPTCP = (
    "import socket,time;s=socket.socket(2,1,262);s.bind(('',9));s.listen();open('/said','w').write('1');time.sleep(1e6)"
)


@pytest.mark.parametrize(("program", "advice"), [(IO_URING, "io_uring"), (MPTCP, "MPTCP")], ids=["io_uring", "mptcp"])
def test_what_cannot_be_dumped_is_said_before_anything_is_sent(
    standing: ContainerStage, program: str, advice: str
) -> None:
    standing.run_container("odd1", "base", "--command", f'python3 -c "{program}"')
    root = Path(standing.site("oslo").client.guest("odd1")["root_files"])
    with contextlib.suppress(AssertionError):
        wait_for((root / "said").exists, 10)
    if not (root / "said").exists() or (root / "said").read_text().startswith("-"):
        pytest.skip(f"this kernel has no {advice}")
    sent = standing.scenario.wan_bytes()
    handoff = standing.begin("odd1")
    code, _, err = handoff.result()
    assert code == Unsupported.exit_code and advice in err, err
    assert standing.scenario.wan_bytes() - sent < 60_000
    handoff.settled()
    assert standing.home("odd1") == "oslo"


def test_a_container_of_a_disk_image_and_the_reverse_are_refused(standing: ContainerStage) -> None:
    done = standing.site("oslo").haulier("guest", "run", "vm1", "--image", "game", "--kind", "vm", check=False)
    assert done.returncode == 2 and "container" in done.stderr


def test_an_agent_that_starts_again_finds_its_container(standing: ContainerStage) -> None:
    standing.run_container("game1", "game", memory="128M")
    oslo = standing.site("oslo")
    pid = oslo.client.guest("game1")["pid"]
    oslo.kill_agent()
    oslo.start_agent()
    facts = oslo.client.guest("game1")
    assert facts["pid"] == pid and facts["status"] == "running" and facts["kind"] == "container"
    root = Path(facts["root_files"])
    (root / "srv/note").write_text("kept")
    assert oslo.facts("guest", "stop", "game1", "--force")["status"] == "stopped"
    assert not alive(pid)
    assert oslo.facts("guest", "start", "game1")["status"] == "running"
    assert oslo.facts("image", "commit", "game1", "kept")["name"] == "kept"
    oslo.facts("guest", "run", "kept1", "--image", "kept", "--memory", "128M")
    other = Path(oslo.client.guest("kept1")["root_files"])
    assert (other / "srv/note").read_text() == "kept"
    oslo.haulier("guest", "remove", "kept1", "--force")
    oslo.haulier("image", "remove", "kept")
    assert len(oslo.facts("gc")["handoffs"]) >= 1, "the layer that nobody has any more"
    assert (root / "srv/note").read_text() == "kept"
    assert "haulier-game1" in Path(f"/proc/{oslo.client.guest('game1')['pid']}/cgroup").read_text()
