"""The bytes of a tensor as AES-256-GCM chunks.

A chunk has CHUNK_BYTES of plaintext, the last one of a tensor what is left. Its nonce is its number
among all chunks under the same data key, in the order of the header: unique, since a data key is
made for one sealing. Its associated data name the sealing, the model and its version, the file and
the digest of its prefix, the tensor with its part and size, and the chunk's number and how many
there are: no chunk can stand for another, and none can be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.weights.sealed.header import SealedFile, SealedTensor, SealHeader

CHUNK_BYTES = 1 << 18
TAG_BYTES = 16
_NONCE_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class SealedExtent:
    """Where the chunks of a tensor lie, and what they are bound to.

    `first_nonce` is the number of its first chunk among those under the same data key.
    """

    tensor: SealedTensor
    offset: int  # in the sealed file
    first_nonce: int
    binding: bytes

    @property
    def num_chunks(self) -> int:
        return num_chunks(self.tensor.size_bytes)

    def chunk_size(self, chunk: int) -> int:
        """Bytes of plaintext."""
        return min(CHUNK_BYTES, self.tensor.size_bytes - chunk * CHUNK_BYTES)

    def chunk_offset(self, chunk: int) -> int:
        """Where a chunk begins in the sealed file."""
        return self.offset + chunk * (CHUNK_BYTES + TAG_BYTES)

    def seal(self, key: bytes, chunk: int, plaintext: npt.NDArray[np.uint8]) -> bytes:
        """Returns the chunk with its tag."""
        return AESGCM(key).encrypt(self._nonce(chunk), plaintext.data, self._associated(chunk))

    def open_into(
        self, key: bytes, chunk: int, sealed: bytes, plaintext: npt.NDArray[np.uint8]
    ) -> bool:
        """Whether the chunk is the one that belongs here; then `plaintext` has it."""
        nonce, associated = self._nonce(chunk), self._associated(chunk)
        try:
            AESGCM(key).decrypt_into(nonce, sealed, associated, plaintext.data)
        except InvalidTag:
            return False
        return True

    def _nonce(self, chunk: int) -> bytes:
        return (self.first_nonce + chunk).to_bytes(_NONCE_BYTES, "big")

    def _associated(self, chunk: int) -> bytes:
        return self.binding + chunk.to_bytes(8, "big") + self.num_chunks.to_bytes(8, "big")


def num_chunks(size_bytes: int) -> int:
    """Chunks of so many bytes of plaintext."""
    return -(-size_bytes // CHUNK_BYTES)


def sealed_bytes(size_bytes: int) -> int:
    """Bytes that plaintext of this size takes when it is sealed."""
    return size_bytes + TAG_BYTES * num_chunks(size_bytes)


def sealed_extents(header: SealHeader) -> dict[str, tuple[SealedExtent, ...]]:
    """The extents of every file, by its name: computed, since nothing about them is free."""
    next_nonce = dict.fromkeys(header.parts, 0)
    return {file.name: tuple(_extents(header, file, next_nonce)) for file in header.files}


def _extents(
    header: SealHeader, file: SealedFile, next_nonce: dict[str, int]
) -> Iterator[SealedExtent]:
    offset = file.prefix_bytes
    for tensor in file.tensors:
        yield SealedExtent(
            tensor=tensor,
            offset=offset,
            first_nonce=next_nonce[tensor.part],
            binding=_binding(header, file, tensor),
        )
        offset += sealed_bytes(tensor.size_bytes)
        next_nonce[tensor.part] += num_chunks(tensor.size_bytes)


def _binding(header: SealHeader, file: SealedFile, tensor: SealedTensor) -> bytes:
    fields = (
        *("penstock chunk 1", header.seal_id, header.model, header.version),
        *(file.name, file.prefix_sha256, tensor.part, tensor.name, str(tensor.size_bytes)),
    )
    encoded = [field.encode() for field in fields]
    return b"".join(len(field).to_bytes(4, "big") + field for field in encoded)
