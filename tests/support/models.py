"""Tiny random models on disk, in the formats that real ones come in.

The same TinyModel has the same weights in every format, so formats can be compared. What
is written is what transformers and ggml's converters write; tests prove it against them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tests.support.tiny_tokenizer import write_tiny_tokenizer

Weights = dict[str, npt.NDArray[np.float32]]

_BIASED_QKV = ("qwen2",)
_QK_NORM = ("qwen3",)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Sizes and options; `extra` goes into config.json as it is (and overrides)."""

    family: str = "llama"
    num_layers: int = 4
    hidden_size: int = 64
    intermediate_size: int = 96
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 272
    context_length: int = 512
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    sliding_window: int | None = None
    attention_bias: bool = False  # llama and qwen3: on q, k, v and o
    mlp_bias: bool = False  # llama
    tied_head: bool = False
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


# One of each kind that the engine has to compute.
TINY_MODELS = {
    "llama": TinyModel(),
    "llama-tied": TinyModel(tied_head=True, num_kv_heads=4),
    "llama-wide-heads": TinyModel(head_dim=32, num_kv_heads=1),
    "llama-biases": TinyModel(attention_bias=True, mlp_bias=True),
    "llama3": TinyModel(
        rope_theta=500000.0,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-linear": TinyModel(rope_parameters={"rope_type": "linear", "factor": 4.0}),
    "mistral": TinyModel(family="mistral", sliding_window=24),
    "qwen2": TinyModel(family="qwen2", tied_head=True, rope_theta=1e6),
    "qwen2-windows": TinyModel(
        family="qwen2",
        sliding_window=24,
        extra={"use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen2-yarn": TinyModel(
        family="qwen2",
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "qwen3": TinyModel(family="qwen3", head_dim=32, rope_theta=1e6),
}


def hugging_face_config(model: TinyModel) -> dict[str, Any]:
    """config.json in the layout of transformers 5."""
    rope = {"rope_type": "default", "rope_theta": model.rope_theta} | dict(model.rope_parameters)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied_head,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    if model.family != "llama":
        config["sliding_window"] = model.sliding_window
    if model.family in ("llama", "qwen3"):
        config["attention_bias"] = model.attention_bias
    if model.family == "llama":
        config["mlp_bias"] = model.mlp_bias
    return config | dict(model.extra)


def random_weights(model: TinyModel) -> Weights:
    """Seeded weights by Hugging Face's names, scaled so that activations stay near 1."""
    random = np.random.default_rng(model.seed)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    def vector(size: int, *, mean: float) -> npt.NDArray[np.float32]:
        return (mean + 0.2 * random.standard_normal(size)).astype(np.float32)

    hidden, inner = model.hidden_size, model.intermediate_size
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights: Weights = {"model.embed_tokens.weight": matrix(model.vocab_size, hidden) * 8}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        projections = {
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, (rows, columns) in projections.items():
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if _has_bias(model, name):
                weights[f"{prefix}{name}.bias"] = vector(rows, mean=0.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = vector(hidden, mean=1.0)
        if model.family in _QK_NORM:
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                weights[f"{prefix}{name}.weight"] = vector(model.head_dim, mean=1.0)
    weights["model.norm.weight"] = vector(hidden, mean=1.0)
    if not model.tied_head:
        weights["lm_head.weight"] = matrix(model.vocab_size, hidden)
    return weights


def write_hugging_face(
    folder: Path, model: TinyModel, *, dtype: str = "F32", num_shards: int = 1
) -> Path:
    """Writes config.json and safetensors ("F32", "F16" or "BF16") into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model)))
    weights = random_weights(model)
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype=dtype)
        return folder
    names = list(weights)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        write_safetensors(folder / file_name, part, dtype=dtype)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_servable(folder: Path, model: TinyModel | None = None) -> Path:
    """A folder with everything that serving needs: weights, config.json and a tokenizer."""
    write_hugging_face(folder, model or TinyModel())
    return write_tiny_tokenizer(folder)


def write_safetensors(path: Path, weights: Weights, *, dtype: str = "F32") -> None:
    to_bytes = {"F32": lambda x: x, "F16": lambda x: x.astype(np.float16), "BF16": bf16_bits}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in weights.items():
        first = len(data)
        data += to_bytes[dtype](array).tobytes()
        offsets = [first, len(data)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
    write_raw_safetensors(path, header, data)


def write_raw_safetensors(path: Path, header: object, data: bytes) -> None:
    """Writes a header, right or wrong, and data as they are."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds to nearest even and keeps the upper half."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_gguf(
    path: Path,
    model: TinyModel,
    *,
    block_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    other_types: Mapping[str, GGMLQuantizationType] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model as ggml's converters do: matrices as `block_type`, vectors as F32, but
    for `other_types` by name in the file; q and k of the Llama architecture permuted; Llama 3's
    scaling as explicit factors. `extra` adds or overrides key-values (bool, int, float or str).
    """
    architecture = "llama" if model.family == "mistral" else model.family
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_gguf_metadata(model, architecture) | dict(extra or {})).items():
        _add(writer, key, value)
    if model.rope_parameters.get("rope_type") == "llama3":
        factors = llama3_factors(model)
        writer.add_tensor("rope_freqs.weight", factors)
    for name, array in random_weights(model).items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = model.num_heads if ".q_proj." in name else model.num_kv_heads
            array = interleave(array, num_heads=heads)
        usual = block_type if array.ndim == 2 else GGMLQuantizationType.F32
        kind = (other_types or {}).get(gguf_name(name), usual)
        writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama2c(path: Path, model: TinyModel) -> Path:
    """Writes llama2.c's version 0; the model has to be a plain Llama with head_dim x heads =
    hidden size."""
    weights = random_weights(model)
    hidden, layers = model.hidden_size, range(model.num_layers)
    sign = 1 if model.tied_head else -1
    header = np.array(
        [
            hidden,
            model.intermediate_size,
            model.num_layers,
            model.num_heads,
            model.num_kv_heads,
            sign * model.vocab_size,
            model.context_length,
        ],
        "<i4",
    )
    arrays = [weights["model.embed_tokens.weight"]]
    for name in _LLAMA2C_ORDER:
        for layer in layers:
            array = weights[f"model.layers.{layer}.{name}.weight"]
            if name.endswith(("q_proj", "k_proj")):
                heads = model.num_heads if name.endswith("q_proj") else model.num_kv_heads
                array = interleave(array, num_heads=heads)
            arrays.append(array)
    arrays.append(weights["model.norm.weight"])
    arrays.append(np.zeros((2, model.context_length, model.head_dim // 2), np.float32))
    if not model.tied_head:
        arrays.append(weights["lm_head.weight"])
    path.write_bytes(header.tobytes() + b"".join(array.tobytes() for array in arrays))
    return path


def interleave(rows: npt.NDArray[np.float32], *, num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from halves (Hugging Face) to interleaved pairs, one index at a time."""
    head_dim = len(rows) // num_heads
    order = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return rows[order]


def llama3_factors(model: TinyModel) -> npt.NDArray[np.float32]:
    """What ggml's converter computes for `rope_freqs.weight` (Llama 3.1's reference code)."""
    options = model.rope_parameters
    context = options["original_max_position_embeddings"]
    low, high = context / options["low_freq_factor"], context / options["high_freq_factor"]
    factors = []
    for index in range(model.head_dim // 2):
        wavelength = 2 * math.pi * model.rope_theta ** (2 * index / model.head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(options["factor"])
        else:
            smooth = (context / wavelength - options["low_freq_factor"]) / (
                options["high_freq_factor"] - options["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / options["factor"] + smooth))
    return np.array(factors, np.float32)


def gguf_name(name: str) -> str:
    """ggml's name for a Hugging Face tensor."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(middle)]}.{kind}"


def _has_bias(model: TinyModel, name: str) -> bool:
    if name.startswith("mlp."):
        return model.mlp_bias
    if model.family in _BIASED_QKV:
        return not name.endswith("o_proj")
    return model.attention_bias


def _gguf_metadata(model: TinyModel, architecture: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": model.num_layers,
        "context_length": model.context_length,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": model.rope_theta,
        "vocab_size": model.vocab_size,
    }
    if architecture == "llama":
        values["rope.dimension_count"] = model.head_dim
    if model.family == "mistral":
        values["attention.sliding_window"] = model.sliding_window
    if (kind := model.rope_parameters.get("rope_type")) in ("linear", "yarn"):
        values["rope.scaling.type"] = kind
        values["rope.scaling.factor"] = model.rope_parameters["factor"]
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = model.rope_parameters[
            "original_max_position_embeddings"
        ]
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    return {f"{architecture}.{key}": value for key, value in values.items()} | tokens


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA2C_ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
