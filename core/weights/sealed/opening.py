"""Opens a sealed model as a checkpoint of the format that was sealed.

Only where bytes come from differs: the readers of GGUF, safetensors and llama2.c see the plain
file's offsets and bytes, so every number format computes the same bits as from the plain model.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, closing
from pathlib import Path

from core.errors import SealBroken
from core.weights.checkpoint import Checkpoint
from core.weights.formats import read_as
from core.weights.sealed.chunks import sealed_extents
from core.weights.sealed.data_keys import DataKeys
from core.weights.sealed.header import HEADER_NAME, SEALED_SUFFIX, SealHeader, read_header
from core.weights.sealed.identity import SealKeys
from core.weights.sealed.sealed_file import OpenSealedFile


def is_sealed(path: Path) -> bool:
    """Whether a folder claims to be a sealed model."""
    return (path / HEADER_NAME).is_file()


def open_sealed(path: Path, keys: SealKeys) -> Checkpoint:
    """Opens a sealed folder. Tensors are decrypted as they are read, in memory.

    Raises NotFound; SealBroken where something is not as the sealer signed it. Reading tensors
    raises KeyRefused as well, where the identity may not open them.
    """
    header = read_header(path, sealer=keys.sealer)
    _check_folder(path, header)
    data_keys, extents = DataKeys(header, keys.identity), sealed_extents(header)
    with ExitStack() as stack:
        files = []
        for file in header.files:
            sealed_path = path / (file.name + SEALED_SUFFIX)
            opened = OpenSealedFile(sealed_path, file, extents[file.name], data_keys)
            files.append(stack.enter_context(closing(opened)))
        checkpoint = read_as(header.format, path, files)
        stack.pop_all()  # which the checkpoint closes
    return checkpoint


def _check_folder(path: Path, header: SealHeader) -> None:
    """Raises SealBroken where a readable file is not as it was, is missing, or was added: what
    reads a model may look for any name."""
    for name, digest in header.companions.items():
        companion = path / name
        if not companion.is_file():
            raise SealBroken(f"{companion} is missing")
        with companion.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise SealBroken(f"{companion} has the SHA-256 {found}; {digest} was sealed")
    sealed = {file.name + SEALED_SUFFIX for file in header.files}
    known = {*header.companions, *sealed, HEADER_NAME, f"{HEADER_NAME}.new"}
    added = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
    if added:
        raise SealBroken(f"{path} holds {added[0]!r}, which was not sealed with the model")
