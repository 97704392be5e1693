"""What of an LXC container's configuration goes with it; the program that LXC finds in CRIU's place."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from haulier.containers.lxc import _wrapper, kept_of, parse_config
from haulier.containers.model import ContainerSpec
from haulier.errors import GuestError, Unsupported, UsageError


def test_includes_are_put_in(tmp_path: Path) -> None:
    folder = tmp_path / "common.d"
    folder.mkdir()
    (folder / "b.conf").write_text("lxc.pty.max = 9\n")
    (folder / "a.conf").write_text("# nothing\nlxc.tty.max = 0\n")
    (folder / "not.txt").write_text("lxc.uts.name = no\n")
    (tmp_path / "config").write_text(f"lxc.include = {folder}\nlxc.init.cmd=/sbin/init  a = b \n\nnonsense\n")
    found = parse_config(tmp_path / "config")
    assert found == [("lxc.tty.max", "0"), ("lxc.pty.max", "9"), ("lxc.init.cmd", "/sbin/init  a = b")]
    (folder / "c.conf").write_text(f"lxc.include = {tmp_path}/config\n")
    with pytest.raises(GuestError, match="included"):
        parse_config(tmp_path / "config")
    with pytest.raises(GuestError, match="cannot be read"):
        parse_config(tmp_path / "none")


def test_only_what_is_the_same_everywhere_goes_with_it() -> None:
    settings = [
        ("lxc.rootfs.path", "dir:/srv/c"),
        ("lxc.net.0.type", "veth"),
        ("lxc.init.cmd", "/bin/x"),
        ("lxc.cgroup.memory.limit_in_bytes", "64M"),
        ("lxc.hook.clone", "/usr/share/lxc/hooks/clonehostname"),
        ("lxc.mount.entry", ""),
    ]
    assert kept_of(settings) == ("lxc.init.cmd = /bin/x", "lxc.cgroup.memory.limit_in_bytes = 64M")


ODD = ["lxc.idmap", "lxc.mount.entry", "lxc.hook.pre-start", "lxc.seccomp.profile", "lxc.namespace.share.net"]


@pytest.mark.parametrize("key", ODD)
def test_what_cannot_be_the_same_elsewhere_is_refused(key: str) -> None:
    with pytest.raises(Unsupported, match=key.replace(".", "\\.")):
        kept_of([(key, "something")])
    # Nor is it taken from another site, whatever that one let through.
    with pytest.raises(UsageError):
        ContainerSpec(layers=(1,), command=("x",), lxc=(f"{key} = something",))


@pytest.mark.parametrize(
    "line", ["lxc.tty.max = 1\nlxc.hook.start = /bin/sh", "lxc.tty.max=1", "lxc.tty.max = " + "1" * 5000]
)
def test_lines_from_elsewhere_are_single_and_bounded(line: str) -> None:
    with pytest.raises(UsageError):
        ContainerSpec(layers=(1,), command=("x",), lxc=(line,))
    good = ContainerSpec(layers=(1,), command=("x",), lxc=("lxc.tty.max = 1",))
    assert msgspec.convert(msgspec.to_builtins(good), ContainerSpec) == good


def test_criu_gets_the_namespace_and_no_profile_that_the_kernel_lacks(tmp_path: Path) -> None:
    real = tmp_path / "criu it"
    real.write_text('#!/bin/sh\nfor w in "$@"; do echo "[$w]"; done\ncat <&9\n')
    real.chmod(0o755)
    (tmp_path / "name space").write_text("net")
    wrapper = tmp_path / "criu"
    wrapper.write_text(_wrapper(str(real), str(tmp_path / "name space")))
    wrapper.chmod(0o755)
    words = ["restore", "-o", "a b", "--lsm-profile", "apparmor:unconfined", "--root", "/x"]
    said = subprocess.run([wrapper, *words], capture_output=True, text=True, check=True).stdout
    wanted = ["[restore]", "[-o]", "[a b]", "[--root]", "[/x]", "[--inherit-fd]", "[fd[9]:extRootNetNS]", "net"]
    if Path("/sys/kernel/security/apparmor").is_dir():
        wanted[3:3] = ["[--lsm-profile]", "[apparmor:unconfined]"]
    assert said.split("\n") == wanted
