"""What a chunk is bound to, beside its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from core.weights.sealed.chunks import CHUNK_BYTES, SealedExtent, sealed_extents
from core.weights.sealed.header import SealedFile, SealedTensor, SealHeader

KEY = bytes(32)
TENSORS = (
    SealedTensor(name="a", size_bytes=2 * CHUNK_BYTES, part="layer-0"),
    SealedTensor(name="b", size_bytes=0, part="layer-0"),
    SealedTensor(name="c", size_bytes=CHUNK_BYTES + 1, part="layer-1"),
    SealedTensor(name="d", size_bytes=5, part="layer-0"),
)
HEADER = SealHeader(
    model="m",
    version="1",
    seal_id="0" * 32,
    format="safetensors",
    files=tuple(
        SealedFile(name=name, prefix_bytes=8, prefix_sha256="a" * 64, tensors=tensors)
        for name, tensors in (("one", TENSORS[:3]), ("two", TENSORS[3:]))
    ),
    companions={},
    holders={},
)
Change = Callable[[SealHeader], SealHeader]


def first_extent(header: SealHeader) -> SealedExtent:
    return sealed_extents(header)[header.files[0].name][0]


def with_file(header: SealHeader, **changes: object) -> SealHeader:
    return replace(header, files=(replace(header.files[0], **changes), *header.files[1:]))  # type: ignore[arg-type]


def with_tensor(header: SealHeader, **changes: object) -> SealHeader:
    first, *others = header.files[0].tensors
    return with_file(header, tensors=(replace(first, **changes), *others))  # type: ignore[arg-type]


CHANGES: dict[str, Change] = {
    "sealing": lambda header: replace(header, seal_id="1" * 32),
    "model": lambda header: replace(header, model="n"),
    "version": lambda header: replace(header, version="2"),
    "file": lambda header: with_file(header, name="other"),
    "prefix": lambda header: with_file(header, prefix_sha256="b" * 64),
    "tensor": lambda header: with_tensor(header, name="z"),
    "part": lambda header: with_tensor(header, part="layer-2"),
    "number of chunks": lambda header: with_tensor(header, size_bytes=3 * CHUNK_BYTES),
}


def opens(sealed: bytes, extent: SealedExtent, chunk: int) -> bool:
    return extent.open_into(KEY, chunk, sealed, np.empty(CHUNK_BYTES, np.uint8))


def test_a_chunk_opens_where_it_belongs() -> None:
    extent = first_extent(HEADER)
    plaintext = np.arange(CHUNK_BYTES, dtype=np.uint32).astype(np.uint8)
    found = np.empty(CHUNK_BYTES, np.uint8)
    assert extent.open_into(KEY, 1, extent.seal(KEY, 1, plaintext), found)
    np.testing.assert_array_equal(found, plaintext)


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_under_the_same_key_and_nonce_a_chunk_opens_nowhere_else(what: str) -> None:
    extent, other = first_extent(HEADER), first_extent(CHANGES[what](HEADER))
    assert other.first_nonce == extent.first_nonce
    sealed = extent.seal(KEY, 0, np.zeros(CHUNK_BYTES, np.uint8))
    assert opens(sealed, extent, 0)
    assert not opens(sealed, other, 0)


def test_a_chunk_opens_under_no_other_number() -> None:
    extent = first_extent(HEADER)
    shifted = replace(extent, first_nonce=extent.first_nonce - 1 + 2**32)
    sealed = shifted.seal(KEY, 1, np.zeros(CHUNK_BYTES, np.uint8))
    same_nonce = replace(shifted, first_nonce=shifted.first_nonce + 1)
    assert not opens(sealed, same_nonce, 0)


def test_no_two_chunks_share_a_key_and_a_nonce() -> None:
    used = [
        (extent.tensor.part, extent.first_nonce + chunk)
        for extents in sealed_extents(HEADER).values()
        for extent in extents
        for chunk in range(extent.num_chunks)
    ]
    assert len(set(used)) == len(used) == 5
    numbers = sorted(number for part, number in used if part == "layer-0")
    assert numbers == [0, 1, 2]


def test_chunks_follow_each_other_without_a_gap() -> None:
    one, two = sealed_extents(HEADER).values()
    assert [extent.offset for extent in one] == [
        8,
        8 + 2 * (CHUNK_BYTES + 16),
        8 + 2 * (CHUNK_BYTES + 16),
    ]
    assert [extent.chunk_size(0) for extent in (one[0], one[2], two[0])] == [
        CHUNK_BYTES,
        CHUNK_BYTES,
        5,
    ]
    assert one[2].chunk_size(1) == 1
