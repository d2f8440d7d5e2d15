"""The number formats a mesh can be told, and what `auto` stands for."""

from __future__ import annotations

from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import model_sizes
from core.weights.checkpoint import Checkpoint

NUMBER_FORMATS = ("bf16", "fp32", "int8")
# All that `auto` may stand for.
AUTOMATIC = ("int8", "bf16")
# In a file of so few bits a weight, they have been rounded more coarsely than int8 rounds; Q8_0
# takes 8.5.
MOST_BITS_OF_QUANTISED = 9.0


def choose_number_format(dtype: str, checkpoint: Checkpoint, config: LlamaConfig) -> str:
    """One of NUMBER_FORMATS: for "auto" int8 where the file's weights are quantised already, which
    then costs little quality, and else bf16. Raises CorruptWeights; reads headers only."""
    if dtype != "auto":
        return dtype
    layers = model_sizes(checkpoint, config).layers
    num_bytes = sum(layer.file_bytes for layer in layers)
    bits = 8 * num_bytes / sum(layer.num_parameters for layer in layers)
    return "int8" if bits <= MOST_BITS_OF_QUANTISED else "bf16"
