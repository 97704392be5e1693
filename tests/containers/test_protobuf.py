"""CRIU's messages: what is encoded comes back, what is cut short is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.containers.protobuf import field, fields, varint
from haulier.errors import Corrupt


@given(st.dictionaries(st.integers(1, 1000), st.one_of(st.integers(0, (1 << 63) - 1), st.binary(max_size=300))))
def test_what_goes_in_comes_out(values: dict[int, int | bytes]) -> None:
    assert fields(b"".join(field(number, value) for number, value in values.items())) == values


def test_known_bytes() -> None:
    # As protoc encodes {1: 150, 2: "testing"}, the examples of the format's own documentation.
    assert field(1, 150) + field(2, "testing") == bytes.fromhex("089601120774657374696e67")
    assert varint(0) == b"\0"


@pytest.mark.parametrize("text", ["08", "0896", "1207746573", "0b", "08" + "ff" * 12])
def test_what_is_cut_short_is_refused(text: str) -> None:
    with pytest.raises(Corrupt):
        fields(bytes.fromhex(text))
