"""The number formats a mesh can be told, and what `auto` stands for."""

from __future__ import annotations

from core.errors import InvalidInput
from core.kernels.host_cpu import integer_instructions
from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import has_nibbles, model_sizes
from core.weights.checkpoint import Checkpoint

NUMBER_FORMATS = ("bf16", "fp32", "int8", "int4")
# In a file of so few bits a weight, they have been rounded more coarsely than int8 rounds; Q8_0
# takes 8.5.
MOST_BITS_OF_QUANTISED = 9.0


def automatic_formats() -> tuple[str, ...]:
    """All that `auto` may stand for on this host."""
    return ("int4", "int8", "bf16") if prefers_int4() else ("int8", "bf16")


def prefers_int4() -> bool:
    """Whether int4 was measured to be faster than int8 at all loads on CPUs like this host's."""
    return integer_instructions() == "avx2"


def choose_number_format(dtype: str, checkpoint: Checkpoint, config: LlamaConfig) -> str:
    """One of NUMBER_FORMATS: for "auto" int8 or int4 where the file's weights are quantised
    already, which then costs little quality, and else bf16. Reads headers only.

    Raises CorruptWeights; InvalidInput for int4 where the file has no weights of 4 bits.
    """
    if dtype == "int4" and not has_nibbles(checkpoint, config):
        wanted = f"int8 or bf16: {checkpoint.path} has no blocks of Q4_0, Q4_1 or Q4_K"
        raise InvalidInput("dtype", dtype, wanted)
    if dtype != "auto":
        return dtype
    if prefers_int4() and has_nibbles(checkpoint, config):
        return "int4"
    layers = model_sizes(checkpoint, config).layers
    num_bytes = sum(layer.file_bytes for layer in layers)
    bits = 8 * num_bytes / sum(layer.num_parameters for layer in layers)
    return "int8" if bits <= MOST_BITS_OF_QUANTISED else "bf16"
