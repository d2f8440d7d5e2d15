"""A sealed file that reads as the plain one would: chunks are opened in memory as they are asked
for.

Bytes are read, not mapped: what has been authenticated is a copy that nobody else can change.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import NotFound, SealBroken
from core.weights.extents import FileExtents, follow
from core.weights.sealed.chunks import CHUNK_BYTES, TAG_BYTES, SealedExtent, sealed_bytes
from core.weights.sealed.data_keys import DataKeys
from core.weights.sealed.header import SealedFile


class OpenSealedFile:
    """A WeightFile; offsets are those of the plain file. See `WeightFile` for the promises.

    `view` raises KeyRefused where the identity may not hold the tensor's data key, and SealBroken
    where a byte of the tensor's chunks is not as it was sealed.
    """

    def __init__(
        self, path: Path, file: SealedFile, extents: tuple[SealedExtent, ...], keys: DataKeys
    ) -> None:
        """Raises NotFound; SealBroken where the prefix is another, or the file's size."""
        self.path = path
        self._extents = extents
        self._keys = keys
        self._plain = FileExtents(
            path=path,
            prefix_bytes=file.prefix_bytes,
            extents=follow(
                ((tensor.name, tensor.size_bytes) for tensor in file.tensors),
                prefix_bytes=file.prefix_bytes,
            ),
        )
        self.size_bytes = self._plain.size_bytes
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise NotFound(f"{path} cannot be opened: {error.strerror}") from error
        # Whoever drops an open checkpoint closes its files, as with those that are mapped.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._check_size(file)
        self.data = self._read_prefix(file)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Returns an array of its own, with the plaintext."""
        if num_bytes == 0:
            return np.empty(0, np.uint8)
        index = self._plain.find(offset, num_bytes)
        extent, start = self._extents[index], offset - self._plain.extents[index].offset
        first = start // CHUNK_BYTES
        end = -(-(start + num_bytes) // CHUNK_BYTES)
        plaintext = self._open(extent, first, end)
        skipped = start - first * CHUNK_BYTES
        return plaintext[skipped : skipped + num_bytes]

    def release(self, offset: int, num_bytes: int) -> None:
        """Nothing is kept of what was viewed."""

    def close(self) -> None:
        self._close()

    def _open(self, extent: SealedExtent, first: int, end: int) -> npt.NDArray[np.uint8]:
        """The plaintext of some of the chunks of a tensor."""
        key = self._keys[extent.tensor.part]
        sizes = [extent.chunk_size(chunk) for chunk in range(first, end)]
        plaintext = np.empty(sum(sizes), np.uint8)
        for number, size in enumerate(sizes):
            chunk = first + number
            sealed = self._read(extent.chunk_offset(chunk), size + TAG_BYTES)
            target = plaintext[number * CHUNK_BYTES :][:size]
            if not extent.open_into(key, chunk, sealed, target):
                raise SealBroken(
                    f"{self.path}: chunk {chunk} of {extent.num_chunks} of {extent.tensor.name!r} "
                    "is not as it was sealed: it was changed, or belongs elsewhere"
                )
        return plaintext

    def _read(self, offset: int, num_bytes: int) -> bytes:
        content = os.pread(self._descriptor, num_bytes, offset)
        if len(content) != num_bytes:
            raise SealBroken(f"{self.path} ends before byte {offset + num_bytes}: it was cut short")
        return content

    def _check_size(self, file: SealedFile) -> None:
        sizes = [sealed_bytes(tensor.size_bytes) for tensor in file.tensors]
        expected = file.prefix_bytes + sum(sizes)
        found = os.fstat(self._descriptor).st_size
        if found != expected:
            raise SealBroken(f"{self.path} has {found} bytes; {expected} were sealed")

    def _read_prefix(self, file: SealedFile) -> bytes:
        prefix = self._read(0, file.prefix_bytes)
        if hashlib.sha256(prefix).hexdigest() != file.prefix_sha256:
            raise SealBroken(
                f"{self.path}: its first {len(prefix)} bytes are not as they were sealed"
            )
        return prefix
