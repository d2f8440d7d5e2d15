"""Whatever bytes stand for a header, they are a header or refused; nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import SealBroken
from core.weights.sealed.header import (
    HEADER_NAME,
    parse_body,
    read_header,
    write_header,
)
from core.weights.sealed.identity import make_identity
from tests.support.seal_headers import HEADER, header_body

PATH = Path(HEADER_NAME)


@pytest.fixture(scope="module")
def body() -> bytes:
    return header_body()


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    sealer = make_identity()
    write_header(tmp_path, HEADER, sealer=sealer)
    assert read_header(tmp_path, sealer=sealer.public) == HEADER


@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(SealBroken):
        parse_body(content, path=PATH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [place]
    for key, one in inner if isinstance(value, dict | list) else ():
        found += _places(one, (*place, key)) if isinstance(one, dict | list) else [(*place, key)]
    return found


@settings(max_examples=300)
@given(data=st.data(), other=JSON)
def test_a_body_with_any_value_in_any_place_is_a_header_or_refused(
    body: bytes, data: st.DataObject, other: Any
) -> None:
    fields = json.loads(body)
    place = data.draw(st.sampled_from(_places(fields)[1:]))
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = other
    try:
        parse_body(json.dumps(fields).encode(), path=PATH)
    except SealBroken:
        return


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("files", 0, "name"), "../m.gguf", "cannot be a file's name"),
        (("files", 0, "prefix_bytes"), -1, "not a number of bytes"),
        (("files", 0, "tensors", 0, 1), 1 << 62, "not a number of bytes"),
        (("files", 0, "tensors", 0, 0), "m.gguf", "occurs twice"),
        (("files",), [], "is no model"),
        (("format",), "pickle", "is no model"),
        (("holders", "owner", "wraps"), {"layer-9": "A" * 107 + "="}, "part that there is not"),
        (("holders", "owner", "opening_key"), "", "32 bytes in base64"),
        (("companions",), {"a/b": "b" * 64}, "cannot be a file's name"),
        (("seal_id",), "x", "16 bytes in hex"),
    ],
)
def test_what_is_wrong_is_named(
    body: bytes, place: tuple[Any, ...], value: object, reason: str
) -> None:
    fields = json.loads(body)
    holder = fields
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(SealBroken, match=reason):
        parse_body(json.dumps(fields).encode(), path=PATH)
