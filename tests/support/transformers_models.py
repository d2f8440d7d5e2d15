"""Models as transformers computes them: the reference for our numbers.

transformers' own `from_pretrained(gguf_file=...)` wants the package accelerate, and takes
40 seconds for the default model; so there are two ways here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import LayerWeights, read_embedding, read_head, read_layer
from core.weights.checkpoint import Checkpoint

_LAYER_NAMES = {
    "attention_norm_H": "input_layernorm.weight",
    "q_PH": "self_attn.q_proj.weight",
    "k_KH": "self_attn.k_proj.weight",
    "v_KH": "self_attn.v_proj.weight",
    "o_HP": "self_attn.o_proj.weight",
    "q_bias_P": "self_attn.q_proj.bias",
    "k_bias_K": "self_attn.k_proj.bias",
    "v_bias_K": "self_attn.v_proj.bias",
    "o_bias_H": "self_attn.o_proj.bias",
    "q_norm_D": "self_attn.q_norm.weight",
    "k_norm_D": "self_attn.k_norm.weight",
    "mlp_norm_H": "post_attention_layernorm.weight",
    "gate_FH": "mlp.gate_proj.weight",
    "up_FH": "mlp.up_proj.weight",
    "down_HF": "mlp.down_proj.weight",
    "gate_bias_F": "mlp.gate_proj.bias",
    "up_bias_F": "mlp.up_proj.bias",
    "down_bias_H": "mlp.down_proj.bias",
}


def load_gguf_model(path: Path) -> Any:
    """Returns the model of a small GGUF file in fp32, read by transformers alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return _with_weights(model, loaded["tensors"])


def transformers_model(checkpoint: Checkpoint, config: LlamaConfig) -> Any:
    """Returns the model of any checkpoint in fp32: our reader, transformers' arithmetic.

    For files that carry no Hugging Face configuration; without rope scaling and windows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert config.rope_scaling is None
    assert not any(config.windows)
    hf_config = AutoConfig.for_model(
        config.family,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_head,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    # Rotary tables are not weights: materialise the model, then make them again.
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return _with_weights(model, _state(checkpoint, config))


def _state(checkpoint: Checkpoint, config: LlamaConfig) -> dict[str, Any]:
    import torch

    head = read_head(checkpoint, config)
    arrays: dict[str, npt.NDArray[np.float32]] = {
        "model.embed_tokens.weight": read_embedding(checkpoint, config),
        "model.norm.weight": head.final_norm_H,
        "lm_head.weight": head.head_VH,
    }
    for layer in range(config.num_layers):
        weights = read_layer(checkpoint, config, layer)
        for field in LayerWeights.__dataclass_fields__:
            if (array := getattr(weights, field)) is not None:
                arrays[f"model.layers.{layer}.{_LAYER_NAMES[field]}"] = array
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _with_weights(model: Any, state: dict[str, Any]) -> Any:
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()
