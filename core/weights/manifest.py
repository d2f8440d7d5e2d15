"""A model's SHA-256 digests, tensor by tensor, and checkpoints that are held to them.

A stage that opens a model with its manifest hashes what it reads, before it uses it: its own
tensors, the files' beginnings, and the files beside the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import InvalidInput, ManifestMismatch, NotFound
from core.weights.checkpoint import Checkpoint
from core.weights.extents import FileExtents, companions, file_extents, follow
from core.weights.formats import FORMATS, read_as
from core.weights.mapped_file import MappedFile

_MOST_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class TensorDigest:
    """Of an extent: the tensor and the padding after it."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FileDigests:
    """Of a file with tensors."""

    name: str
    prefix_bytes: int
    prefix_sha256: str
    tensors: tuple[TensorDigest, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of a model. `companions` are the files beside the weights."""

    format: str
    files: tuple[FileDigests, ...]
    companions: Mapping[str, str]


def make_manifest(checkpoint: Checkpoint) -> Manifest:
    """Hashes all files of a model."""
    return Manifest(
        format=checkpoint.format,
        files=tuple(_digests(file) for file in file_extents(checkpoint)),
        companions={path.name: _file_sha256(path) for path in companions(checkpoint)},
    )


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes JSON; whoever reads `path` meanwhile sees the old file or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    fresh.replace(path)


def read_manifest(path: Path) -> Manifest:
    """Raises NotFound, or InvalidInput where it is no manifest."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidInput("manifest", str(path), "a file of `penstock manifest make`") from None


def open_checked(path: Path, manifest: Manifest) -> Checkpoint:
    """Opens a model whose tensors are checked when they are first read.

    Raises NotFound or ManifestMismatch, as reading does, which names tensor and digests.
    """
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in {file.name for file in manifest.files}:
        raise ManifestMismatch(f"{path} is not in the manifest")
    for name, sha256 in manifest.companions.items():
        _require(_file_sha256(folder / name), sha256, what=f"{folder / name}")
    with ExitStack() as stack:
        files = [CheckedFile(folder / file.name, file) for file in manifest.files]
        for opened in files:
            stack.enter_context(closing(opened))
        checkpoint = read_as(manifest.format, folder, files)
        stack.pop_all()  # which the checkpoint closes
    return checkpoint


def verify(path: Path, manifest: Manifest) -> int:
    """Checks all files of a model; returns the bytes that were hashed. Raises as `open_checked`."""
    checkpoint = open_checked(path, manifest)
    checkpoint.close()
    folder = path if path.is_dir() else path.parent
    num_bytes = 0
    for digests in manifest.files:
        with closing(CheckedFile(folder / digests.name, digests)) as file:
            file.check_all()
            num_bytes += file.size_bytes
    return num_bytes


class CheckedFile:
    """A WeightFile; see there for the promises."""

    def __init__(self, path: Path, digests: FileDigests) -> None:
        """Raises NotFound; ManifestMismatch where the size or the prefix is another."""
        self.path = path
        self._digests = digests
        sizes = ((tensor.name, tensor.size_bytes) for tensor in digests.tensors)
        self._extents = FileExtents(
            path=path,
            prefix_bytes=digests.prefix_bytes,
            extents=follow(sizes, prefix_bytes=digests.prefix_bytes),
        )
        self._unchecked = set(range(len(digests.tensors)))
        self._file = MappedFile(path)
        self.size_bytes = self._file.size_bytes
        self.data = self._file.data
        if self.size_bytes != self._extents.size_bytes:
            raise ManifestMismatch(
                f"{path} has {self.size_bytes} bytes; in its manifest it has "
                f"{self._extents.size_bytes}"
            )
        prefix = hashlib.sha256(self.data[: digests.prefix_bytes]).hexdigest()
        what = f"{path}: its first {digests.prefix_bytes} bytes"
        _require(prefix, digests.prefix_sha256, what=what)

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        if num_bytes:
            self._check(self._extents.find(offset, num_bytes))
        return self._file.view(offset, num_bytes)

    def release(self, offset: int, num_bytes: int) -> None:
        self._file.release(offset, num_bytes)

    def close(self) -> None:
        self._file.close()

    def check_all(self) -> None:
        """Raises ManifestMismatch where any byte is another."""
        for index in sorted(self._unchecked):
            self._check(index)

    def _check(self, index: int) -> None:
        if index not in self._unchecked:
            return
        extent, digest = self._extents.extents[index], self._digests.tensors[index]
        found = hashlib.sha256(self._file.view(extent.offset, extent.size_bytes).data).hexdigest()
        _require(found, digest.sha256, what=f"{self.path}: {extent.name!r}")
        self._file.release(extent.offset, extent.size_bytes)
        self._unchecked.discard(index)


def _require(found: str, expected: str, *, what: str) -> None:
    if found != expected:
        raise ManifestMismatch(f"{what} has the SHA-256 {found}; the manifest has {expected}")


def _digests(file: FileExtents) -> FileDigests:
    with closing(MappedFile(file.path)) as opened:
        return FileDigests(
            name=file.path.name,
            prefix_bytes=file.prefix_bytes,
            prefix_sha256=hashlib.sha256(opened.data[: file.prefix_bytes]).hexdigest(),
            tensors=tuple(
                TensorDigest(
                    name=extent.name,
                    size_bytes=extent.size_bytes,
                    sha256=hashlib.sha256(
                        opened.view(extent.offset, extent.size_bytes).data
                    ).hexdigest(),
                )
                for extent in file.extents
            ),
        )


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error


def _from_json(fields: Any) -> Manifest:
    """Raises ValueError, TypeError or KeyError."""
    files = tuple(
        FileDigests(
            name=_plain_name(file["name"]),
            prefix_bytes=_size(file["prefix_bytes"]),
            prefix_sha256=str(file["prefix_sha256"]),
            tensors=tuple(
                TensorDigest(
                    name=str(one["name"]),
                    size_bytes=_size(one["size_bytes"]),
                    sha256=str(one["sha256"]),
                )
                for one in file["tensors"]
            ),
        )
        for file in fields["files"]
    )
    if fields["format"] not in FORMATS or not files:
        raise ValueError("no model")
    companions = {_plain_name(name): str(one) for name, one in fields["companions"].items()}
    return Manifest(format=fields["format"], files=files, companions=companions)


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError("no file name")
    return name


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("no size")
    return value
