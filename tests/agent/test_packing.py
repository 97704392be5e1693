"""Bodies of calls, packed against the usual ones: come back as they were, bounded, and much smaller."""

from __future__ import annotations

import json
import os
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.agent import packing
from haulier.errors import Corrupt
from haulier.handoff.messages import Offer

OFFER = Offer(
    handoff="h4wt7zzghdwcq",
    source="porto",
    spec={"name": "web", "uuid": "2790eeb8-0fce-4c66-87dc-6bf18e3aa451", "memory_mib": 2048, "net": "keep"},
    epoch=7,
    secret=os.urandom(32).hex(),
    manifest=os.urandom(32).hex(),
    host={"kernel": "6.12.1", "criu": "4.2", "cpu": "aes avx avx2 bmi1 fma lm sse4_2 ssse3 xsave", "vdso": "4711"},
)


@given(st.binary(max_size=2000))
def test_what_is_packed_comes_back(data: bytes) -> None:
    assert packing.unpack(packing.pack(data), 2000) == data


def test_an_offer_is_much_smaller() -> None:
    data = json.dumps(msgspec.to_builtins(OFFER)).encode()
    assert len(packing.pack(data)) < 0.4 * len(data)
    assert len(packing.pack(data)) < 0.6 * len(zlib.compress(data, 9))


def test_no_more_comes_out_than_is_allowed() -> None:
    packed = packing.pack(bytes(10_000))
    assert len(packing.unpack(packed, 10_000)) == 10_000
    with pytest.raises(Corrupt, match="more than 9999 bytes"):
        packing.unpack(packed, 9999)


@pytest.mark.parametrize(
    "data", [b"", b"{}", packing.pack(b"{}" * 40)[:-1], packing.pack(b"{}") + b"x", os.urandom(500)]
)
def test_what_is_not_packed_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        packing.unpack(data, 1000)
