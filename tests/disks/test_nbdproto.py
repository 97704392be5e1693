"""The server's protocol core: any split of the bytes, and bytes that are not the protocol."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.disks import nbdproto as p
from haulier.errors import Corrupt

SIZE = 1 << 20


def core() -> p.ServerCore:
    return p.ServerCore(lambda name: SIZE if name == "disk0" else None, ["disk0"])


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", p.IHAVEOPT, number, len(data)) + data


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


CONVERSATION = b"".join(
    [
        struct.pack(">I", p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES),
        option(5),  # TLS: refused
        option(p.OPT_LIST),
        option(p.OPT_STRUCTURED_REPLY),
        option(p.OPT_LIST_META_CONTEXT, counted(b"disk0") + struct.pack(">I", 0)),
        option(p.OPT_SET_META_CONTEXT, counted(b"disk0") + struct.pack(">I", 1) + counted(b"base:allocation")),
        option(p.OPT_GO, counted(b"nope") + struct.pack(">H", 0)),
        option(p.OPT_GO, counted(b"disk0") + struct.pack(">H", 0)),
        p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_READ, 1, 4096, 512),
        p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, 2, 0, 1000) + bytes(1000),
        p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_FLUSH, 3, 0, 0),
        p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_BLOCK_STATUS, 4, 0, SIZE),
        p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_DISC, 5, 0, 0),
    ]
)


def talk(pieces: list[bytes]) -> tuple[bytes, list[p.Request], bool]:
    server = core()
    out, requests = b"", []
    for piece in pieces:
        requests += server.receive(piece)
        out += b"".join(server.take_output())
    return out, requests, server.closed


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20))
def test_any_split_gives_the_same(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(CONVERSATION)]
    pieces = [CONVERSATION[a:b] for a, b in itertools.pairwise(at)]
    out, requests, closed = talk(pieces)
    assert (out, requests, closed) == talk([CONVERSATION])
    assert [(r.command, r.handle) for r in requests] == [(p.CMD_READ, 1), (p.CMD_BLOCK_STATUS, 4)]
    assert closed
    assert p.SIMPLE.pack(p.SIMPLE_REPLY, p.EPERM, 2) in out


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_waited_for(garbage: bytes) -> None:
    server = core()
    server.receive(struct.pack(">I", 3))
    try:
        server.receive(garbage)
    except Corrupt:
        return
    assert len(server._buffer) <= len(garbage)


@given(st.sampled_from([1, 3, 6, 7, 9, 10]), st.binary(max_size=200))
def test_malformed_options_get_an_error_reply(number: int, data: bytes) -> None:
    server = core()
    server.receive(struct.pack(">I", 3))
    server.take_output()
    server.receive(option(number, data))
    assert server.closed or server.export == "disk0" or b"".join(server.take_output())


def test_an_endless_option_is_not_buffered() -> None:
    server = core()
    server.receive(struct.pack(">I", 3))
    with pytest.raises(Corrupt, match="at most"):
        server.receive(struct.pack(">QII", p.IHAVEOPT, p.OPT_GO, 1 << 31))


def test_a_huge_write_is_not_swallowed() -> None:
    server = core()
    server.receive(struct.pack(">I", 3) + option(p.OPT_EXPORT_NAME, b"disk0"))
    with pytest.raises(Corrupt, match="read-only"):
        server.receive(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, 1, 0, (32 << 20) + 1))


def test_an_old_client_gets_simple_replies() -> None:
    server = core()
    server.receive(struct.pack(">I", 1) + option(p.OPT_EXPORT_NAME, b"disk0"))
    assert len(b"".join(server.take_output())) == 18 + 10 + 124
    (request,) = server.receive(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_READ, 7, 0, 8))
    reply = server.reply_read(request, [(4, b"abcd"), (4, None)])
    assert b"".join(reply) == p.SIMPLE.pack(p.SIMPLE_REPLY, 0, 7) + b"abcd" + bytes(4)
    assert b"".join(server.reply_error(request, p.EIO)) == p.SIMPLE.pack(p.SIMPLE_REPLY, p.EIO, 7)


def test_unknown_export_by_the_old_option_closes() -> None:
    server = core()
    server.receive(struct.pack(">I", 1) + option(p.OPT_EXPORT_NAME, b"nope"))
    assert server.closed
