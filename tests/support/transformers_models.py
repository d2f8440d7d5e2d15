"""Models as transformers computes them: the reference for our numbers.

transformers' own `from_pretrained(gguf_file=...)` wants one more package, and reads the default
model in 9 seconds; so there are other ways here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import LayerWeights, read_embedding, read_head, read_layer
from core.weights.checkpoint import Checkpoint
from tests.support.models import gguf_name, interleave

LAYER_NAMES = {
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
    from transformers import AutoConfig

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
    return _with_weights(_empty_model(hf_config), _state(checkpoint, config))


def gguf_llama_model(path: Path) -> Any:
    """Returns the model of a plain Llama's GGUF file in fp32: sizes and weights by the package
    gguf, names and rotary order by tests/support/models, arithmetic by transformers; nothing
    of ours."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig as Config

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = Config(
        num_hidden_layers=value("block_count"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        vocab_size=value("vocab_size"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )
    model = _empty_model(config)
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensors.pop(gguf_name(name))
        array = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            is_query = name.endswith("q_proj.weight")
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            array = array[np.argsort(interleave(np.arange(len(array)), num_heads=heads))]
        state[name] = torch.from_numpy(array.copy())
    assert not tensors, f"tensors that transformers has no place for: {sorted(tensors)}"
    return _with_weights(model, state)


def gguf_tokenizer(path: Path) -> Backend:
    """Returns a GGUF file's tokenizer as transformers converts it; AutoTokenizer does the same,
    but reads the file three times."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, _ = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    return backend


def _empty_model(config: Any) -> Any:
    """A model whose weights are not set yet, without the time that random ones take."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Rotary tables are not weights: materialise the model, then make them again.
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


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
                arrays[f"model.layers.{layer}.{LAYER_NAMES[field]}"] = array
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _with_weights(model: Any, state: dict[str, Any]) -> Any:
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()
