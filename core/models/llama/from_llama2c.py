"""LlamaConfig from the header of a llama2.c file."""

from __future__ import annotations

from core.models.llama.config import LlamaConfig
from core.weights.checkpoint import Checkpoint


def config_from_llama2c(checkpoint: Checkpoint) -> LlamaConfig:
    """What the header does not say is constant in llama2.c's `run.c` and `model.py`.

    Its stories are separated by the beginning-of-sequence token, so that ends a text as well.
    """
    header = checkpoint.metadata
    return LlamaConfig(
        family="llama",
        num_layers=header["n_layers"],
        hidden_size=header["dim"],
        intermediate_size=header["hidden_dim"],
        num_heads=header["n_heads"],
        num_kv_heads=header["n_kv_heads"],
        head_dim=header["dim"] // header["n_heads"],
        vocab_size=header["vocab_size"],
        context_length=header["seq_len"],
        norm_eps=1e-5,
        rope_theta=10000.0,
        windows=(None,) * header["n_layers"],
        tied_head=bool(header["shared_classifier"]),
        bos_token_id=1,
        eos_token_ids=(2, 1),
    )
