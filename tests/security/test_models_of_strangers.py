"""A model file may be a program: what `torch.load` would run, even with `weights_only`.

CVE-2025-32434. Whatever the file is called, it is refused, and nothing of it is run.
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from core.errors import CorruptWeights, NotFound
from core.weights.open import open_checkpoint


def pickle_that_touches(marker: Path) -> bytes:
    """What `pickle.dumps` makes of an object that is restored by `os.system("touch MARKER")`."""
    command = f"touch {marker}".encode()
    return b"\x80\x04cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."


def as_torch_saves(pickle: bytes) -> bytes:
    """The archive that `torch.save` writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def test_the_pickle_that_the_others_here_offer_does_run(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    program = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    command = [sys.executable, "-c", program]
    subprocess.run(command, input=pickle_that_touches(marker), check=True)
    assert marker.exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf", "model.safetensors"])
@pytest.mark.parametrize("is_archive", [True, False])
def test_cve_2025_32434_a_file_that_is_a_pickle_is_refused(
    tmp_path: Path, name: str, is_archive: bool
) -> None:
    marker = tmp_path / "owned"
    pickle = pickle_that_touches(marker)
    path = tmp_path / name
    path.write_bytes(as_torch_saves(pickle) if is_archive else pickle)
    with pytest.raises(CorruptWeights):
        open_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("is_archive", [True, False])
def test_cve_2025_32434_a_folder_whose_weights_are_a_pickle_is_refused(
    tmp_path: Path, name: str, is_archive: bool
) -> None:
    marker = tmp_path / "owned"
    pickle = pickle_that_touches(marker)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Llama"]}')
    (folder / name).write_bytes(as_torch_saves(pickle) if is_archive else pickle)
    with pytest.raises((CorruptWeights, NotFound)):
        open_checkpoint(folder)
    assert not marker.exists()
