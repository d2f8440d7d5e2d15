"""Packages made on the spot, and an npm registry of our own: fetching without the internet."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from services.local.catalogue import CatalogueFile, CatalogueModel, Part

VERSION = "1.0"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, package: str, content: bytes) -> Part:
    """Writes a wheel that holds `content` as data.bin, and returns its catalogue entry."""
    module = package.replace("-", "_")
    dist_info = f"{module}-{VERSION}.dist-info"
    files = {
        f"{module}/data.bin": content,
        f"{dist_info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n",
        f"{dist_info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{dist_info}/RECORD"] = "".join(f"{name},,\n" for name in files)
    path = folder / f"{module}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    return _part(package, VERSION, path.read_bytes(), member=f"{module}/data.bin")


def npm_tarball(package: str, version: str, content: bytes) -> tuple[bytes, Part]:
    """Returns a tarball that holds `content` as model.part, and its catalogue entry."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        manifest = json.dumps({"name": package, "version": version}).encode()
        for name, text in (("package/package.json", manifest), ("package/model.part", content)):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tarball.addfile(entry, io.BytesIO(text))
    archive = buffer.getvalue()
    return archive, _part(package, version, archive, member="package/model.part")


def catalogue_model(
    parts: list[Part], *, registry: str = "pypi", name: str = "tiny", **files: bytes
) -> CatalogueModel:
    """A model whose files (`__` stands for a dot) are cut from the joined parts."""
    return CatalogueModel(
        name=name,
        description="made for a test",
        num_parameters=1,
        context_length=1,
        number_format="F32",
        licence="MIT",
        registry="npm" if registry == "npm" else "pypi",
        parts=tuple(parts),
        files=tuple(
            CatalogueFile(
                name=file.replace("__", "."), size_bytes=len(content), sha256=sha256(content)
            )
            for file, content in files.items()
        ),
    )


@contextmanager
def npm_registry(tarballs: dict[str, tuple[str, bytes]]) -> Iterator[str]:
    """Serves packages, {name: (version, tarball)}, as an npm registry; yields its URL."""

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").removesuffix(".tgz")
            if name not in tarballs:
                self.send_error(404)
                return
            version, tarball = tarballs[name]
            if self.path.endswith(".tgz"):
                self._send(tarball, "application/octet-stream")
                return
            digest = base64.b64encode(hashlib.sha512(tarball).digest()).decode()
            host = self.headers["Host"]
            dist = {"tarball": f"http://{host}/{name}.tgz", "integrity": f"sha512-{digest}"}
            versions = {version: {"name": name, "version": version, "dist": dist}}
            about = {"name": name, "dist-tags": {"latest": version}, "versions": versions}
            self._send(json.dumps(about).encode(), "application/json")

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Registry)) as url:
        yield url


@contextmanager
def silent_server() -> Iterator[tuple[str, threading.Event]]:
    """An index that takes requests and never answers; yields its URL and an event that says
    that somebody has asked."""
    asked, over = threading.Event(), threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            over.wait()

        def log_message(self, *_: object) -> None:
            pass

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Silent)) as url:
        try:
            yield url, asked
        finally:
            over.set()


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _part(package: str, version: str, archive: bytes, *, member: str) -> Part:
    return Part(
        package=package,
        version=version,
        sha256=sha256(archive),
        size_bytes=len(archive),
        member=member,
    )
