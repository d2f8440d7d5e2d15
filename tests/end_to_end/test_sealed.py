"""A sealed model over two stages, each with a key of its own, served as a user would serve it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numba.core import config

from core.models.registry import load_config
from core.sampling.parameters import SamplingParameters
from core.tokens.tokenizer import load_tokenizer
from core.weights.open import open_checkpoint
from tests.support.chain import Chain
from tests.support.client import connect
from tests.support.local_mesh import ROOT, LocalMesh
from tests.support.models import bf16_bits, write_servable

PROMPT = "hello world"
NUM_TOKENS = 12


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_servable(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture
def mesh(plain: Path, tmp_path: Path) -> Iterator[LocalMesh]:
    """A mesh whose processes write nowhere but below `tmp_path` and where all keep their compiled
    kernels; the model is sealed for it."""
    folders = {name: tmp_path / name for name in ("XDG_CONFIG_HOME", "TMPDIR", "HOME", "runtime")}
    for folder in folders.values():
        folder.mkdir()
    environment = {name: str(folder) for name, folder in folders.items() if name != "runtime"}
    environment["NUMBA_CACHE_DIR"] = config.CACHE_DIR
    mesh = LocalMesh(runtime=folders["runtime"], environment=environment)
    run(mesh, "seal", "keygen")
    run(mesh, "seal", "make", str(plain), "--to", str(tmp_path / "sealed"), "--split", "0:1,1:4")
    yield mesh
    mesh.stop()


def run(mesh: LocalMesh, *command: str) -> str:
    done = mesh.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def served(mesh: LocalMesh, model: Path) -> Iterator[list[int]]:
    """The tokens of an answer, while the mesh still serves."""
    mesh.start("--model", str(model), "--dtype", "bf16", "--kv-memory", "1MiB")
    record = mesh.record
    with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
        sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        yield list(client.generate(prompt=PROMPT, sampling=sampling).token_ids)


def expected_tokens(plain: Path) -> list[int]:
    checkpoint = open_checkpoint(plain)
    chain = Chain(checkpoint, load_config(checkpoint), number_format="bf16", num_kv_blocks=16)
    prompt = load_tokenizer(plain).encode(PROMPT)
    sampling = SamplingParameters(max_tokens=NUM_TOKENS, temperature=0.0)
    (tokens,) = chain.generate([prompt], [sampling])
    return list(tokens)


def files_with(markers: list[bytes], *folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and any(marker in path.read_bytes() for marker in markers)
    ]


def markers_of(plain: Path) -> list[bytes]:
    """A run of each tensor's values, as the file has it and as it is computed with."""
    checkpoint = open_checkpoint(plain)
    rows = [checkpoint.read(name).ravel()[:16] for name in checkpoint.tensor_names]
    return [data.tobytes() for row in rows for data in (row, bf16_bits(np.ascontiguousarray(row)))]


def test_it_answers_as_the_plain_model_and_plaintext_never_touches_the_disk(
    plain: Path, mesh: LocalMesh, tmp_path: Path
) -> None:
    markers = markers_of(plain)
    written = (tmp_path, ROOT / "core", Path(config.CACHE_DIR))
    assert files_with(markers, plain) == [plain / "model.safetensors"]
    with served(mesh, tmp_path / "sealed") as tokens:
        assert tokens == expected_tokens(plain)
        assert not files_with(markers, *written)
        layers = [
            argument
            for command in ("0:1", "1:4")
            for argument in mesh.run("status").stdout.split()
            if argument == command
        ]
        assert layers == ["0:1", "1:4"]
    mesh.stop()
    assert not files_with(markers, *written)


def test_a_stage_whose_key_was_revoked_ends_the_start_and_says_why(
    mesh: LocalMesh, tmp_path: Path
) -> None:
    run(mesh, "seal", "rewrap", str(tmp_path / "sealed"), "--revoke", "stage-1")
    options = ("--split", "0:1,1:4", "--kv-memory", "1MiB", "--grpc-port", "0")
    done = mesh.run("mesh", "--model", str(tmp_path / "sealed"), *options, "--metrics-port", "0")
    assert done.returncode == 1
    assert "stage-1 ended" in done.stderr
    assert "it was revoked" in done.stderr


def test_keys_are_in_no_command_line_and_no_log(mesh: LocalMesh, tmp_path: Path) -> None:
    keys = tmp_path / "XDG_CONFIG_HOME" / "penstock" / "seal-keys"
    secrets = [path.read_bytes().strip().split(b":")[1] for path in keys.glob("*.key")]
    assert len(secrets) == 3
    with served(mesh, tmp_path / "sealed"):
        for process in mesh.record.processes:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert not any(secret in command for secret in secrets)
        assert not files_with(secrets, tmp_path / "runtime", tmp_path / "TMPDIR", tmp_path / "HOME")
