"""Opens a weight file of whatever format."""

from __future__ import annotations

from pathlib import Path

from core.errors import CorruptWeights, InvalidInput, NotFound, SealBroken
from core.weights.checkpoint import Checkpoint
from core.weights.gguf import GgufCheckpoint
from core.weights.gguf_header import MAGIC
from core.weights.llama2c import Llama2cCheckpoint
from core.weights.safetensors import SafetensorsCheckpoint
from core.weights.sealed.identity import SealKeys
from core.weights.sealed.opening import is_sealed, open_sealed

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"


def open_checkpoint(path: Path, *, keys: SealKeys | None = None) -> Checkpoint:
    """Opens a GGUF file, a Hugging Face folder, a llama2.c file or a sealed folder; the content
    decides. Whoever has `keys` opens sealed models only: others would be anybody's.

    Raises NotFound when there is nothing to open, CorruptWeights when what is there is
    damaged or of a format that is not supported, SealBroken, or InvalidInput for a sealed model
    without keys.
    """
    if keys is not None:
        if path.exists() and not is_sealed(path):
            raise SealBroken(f"{path} is not sealed, and only sealed models are opened here")
        return open_sealed(path, keys)
    if path.is_dir():
        return _open_folder(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise NotFound(f"{path} cannot be opened: {error.strerror}") from error
    if not magic:
        raise CorruptWeights(f"{path} is empty")
    if magic == MAGIC or path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CorruptWeights(f"{path} is one weight file; give its folder, with config.json")
    if magic == _ZIP_MAGIC or magic[:1] == _PICKLE_MAGIC:
        raise CorruptWeights(f"{path} holds pickled weights, which are not read: they can run code")
    if path.suffix == ".bin":
        return Llama2cCheckpoint(path)
    raise CorruptWeights(
        f"{path} is neither a GGUF file, nor a folder with safetensors, nor a llama2.c .bin file"
    )


def _open_folder(path: Path) -> Checkpoint:
    if is_sealed(path):
        raise InvalidInput("sealer", "", f"the public key of whoever has sealed {path}")
    if (path / "config.json").exists():
        return SafetensorsCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise NotFound(f"{path} holds several GGUF files; name one of them: {names}")
    raise NotFound(f"{path} holds neither config.json nor a GGUF file")
