"""The readers of all formats, over files that are open already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.errors import CorruptWeights
from core.weights.checkpoint import Checkpoint
from core.weights.gguf import GgufCheckpoint
from core.weights.llama2c import Llama2cCheckpoint
from core.weights.mapped_file import WeightFile
from core.weights.safetensors import SafetensorsCheckpoint

FORMATS = ("gguf", "safetensors", "llama2c")


def read_as(file_format: str, folder: Path, files: Sequence[WeightFile]) -> Checkpoint:
    """Opens a model of one of FORMATS, which closes the files. Raises CorruptWeights."""
    if file_format == "safetensors":
        return SafetensorsCheckpoint(folder, files=files)
    if len(files) != 1:
        raise CorruptWeights(f"{folder}: a {file_format} model is one file, not {len(files)}")
    if file_format == "gguf":
        return GgufCheckpoint(files[0].path, file=files[0])
    return Llama2cCheckpoint(files[0].path, file=files[0])
