"""A file mapped read-only into memory, with every access checked against its size."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights, NotFound


class WeightFile(Protocol):
    """An open file with tensors, whatever stands between it and the disk."""

    @property
    def path(self) -> Path: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def data(self) -> Any:
        """A buffer that begins as the file does and has all before the first tensor."""
        ...

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Returns bytes [num_bytes] of one tensor; the array must be gone before `close`.

        Raises CorruptWeights when the range is not inside the file.
        """
        ...

    def release(self, offset: int, num_bytes: int) -> None:
        """Says that a range which has been viewed will not be again."""
        ...

    def close(self) -> None: ...


class MappedFile:
    """Bytes of a file, paged in by the operating system only where they are touched.

    The file must not shrink while it is open: touching a page that is gone ends the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises NotFound when the file cannot be opened, CorruptWeights when it is empty."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size_bytes = path.stat().st_size
                if self.size_bytes == 0:
                    raise CorruptWeights(f"{path} is empty")
                self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NotFound(f"{path} cannot be opened: {error.strerror}") from error

    @property
    def data(self) -> mmap.mmap:
        """The whole file."""
        return self._mmap

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Returns a view of the map."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size_bytes:
            raise CorruptWeights(
                f"{self.path} has {self.size_bytes} bytes, too few for bytes "
                f"{offset} to {offset + num_bytes}"
            )
        return np.frombuffer(self._mmap, np.uint8, num_bytes, offset)

    def release(self, offset: int, num_bytes: int) -> None:
        """Gives the pages of a range back, so that what was read once does not count as memory
        of the process; they stay in the page cache, and can be read again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        first, end = -(-offset // page) * page, (offset + num_bytes) // page * page
        if end > first:
            self._mmap.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Unmaps the file, or lets it go with the last view where one is still alive (in the
        traceback of an error, say)."""
        with suppress(BufferError):
            self._mmap.close()
