"""Which model families there are: one line for each format they come in."""

from __future__ import annotations

from core.errors import CorruptWeights
from core.models.llama.config import LlamaConfig
from core.models.llama.from_gguf import config_from_gguf
from core.models.llama.from_hugging_face import config_from_hugging_face
from core.models.llama.from_llama2c import config_from_llama2c
from core.models.llama.weight_names import model_sizes
from core.weights.checkpoint import Checkpoint

_CONFIGS = {
    "gguf": config_from_gguf,
    "safetensors": config_from_hugging_face,
    "llama2c": config_from_llama2c,
}


def load_config(checkpoint: Checkpoint) -> LlamaConfig:
    """Reads the sizes and options of the model, and checks that its tensors are all there.

    Raises CorruptWeights for a file that contradicts itself and for every option that we do
    not support, naming it.
    """
    config = _CONFIGS[checkpoint.format](checkpoint)
    _check_sizes(checkpoint, config)
    model_sizes(checkpoint, config)
    return config


def _check_sizes(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise CorruptWeights(
            f"{checkpoint.path}: {config.num_kv_heads} key-value heads do not divide "
            f"{config.num_heads} heads"
        )
    if config.head_dim % 2:
        raise CorruptWeights(
            f"{checkpoint.path}: a head dimension of {config.head_dim} cannot be rotated in halves"
        )
    token_ids = (*config.eos_token_ids, *filter(None, [config.bos_token_id]))
    for token_id in token_ids:
        if token_id >= config.vocab_size:
            raise CorruptWeights(
                f"{checkpoint.path}: the special token {token_id} is outside the vocabulary of "
                f"{config.vocab_size}"
            )
