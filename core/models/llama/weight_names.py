"""Which tensors of a file make up a layer, in every format; read as the engine wants them.

Letters: H hidden size, F intermediate size, P rows of all query heads (heads x D),
K rows of all key-value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights
from core.models.llama.config import LlamaConfig
from core.weights.checkpoint import Checkpoint
from core.weights.gguf import GgufCheckpoint
from core.weights.nibbles import Nibbles

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]
# Matrices of a layer, by their fields in LayerWeights.
MATRIX_FIELDS = ("q_PH", "k_KH", "v_KH", "o_HP", "gate_FH", "up_FH", "down_HF")


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer: float32, C order, projections as [out, in].

    Rows of q and k are in the half-split rotary order.
    """

    attention_norm_H: Array
    q_PH: Array
    k_KH: Array
    v_KH: Array
    o_HP: Array
    q_bias_P: Array | None
    k_bias_K: Array | None
    v_bias_K: Array | None
    o_bias_H: Array | None
    q_norm_D: Array | None
    k_norm_D: Array | None
    mlp_norm_H: Array
    gate_FH: Array
    up_FH: Array
    down_HF: Array
    gate_bias_F: Array | None
    up_bias_F: Array | None
    down_bias_H: Array | None


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """What follows the last layer."""

    final_norm_H: Array
    head_VH: Array  # the embedding, where the two are tied


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Of a layer, the embedding or the head: what it takes on disk, and how many parameters."""

    file_bytes: int
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """`head` is the final norm and the head, even where that is the embedding again: a last
    stage that is not the first has to hold it."""

    layers: tuple[PartSize, ...]
    embedding: PartSize
    head: PartSize


@dataclass(frozen=True)
class Naming:
    """Names of a format. `layer` maps fields of LayerWeights to names with {layer}."""

    layer: Mapping[str, str]
    embedding: str
    final_norm: str
    head: str


NAMINGS = {
    "gguf": Naming(
        layer={
            "attention_norm_H": "blk.{layer}.attn_norm.weight",
            "q_PH": "blk.{layer}.attn_q.weight",
            "k_KH": "blk.{layer}.attn_k.weight",
            "v_KH": "blk.{layer}.attn_v.weight",
            "o_HP": "blk.{layer}.attn_output.weight",
            "q_bias_P": "blk.{layer}.attn_q.bias",
            "k_bias_K": "blk.{layer}.attn_k.bias",
            "v_bias_K": "blk.{layer}.attn_v.bias",
            "o_bias_H": "blk.{layer}.attn_output.bias",
            "q_norm_D": "blk.{layer}.attn_q_norm.weight",
            "k_norm_D": "blk.{layer}.attn_k_norm.weight",
            "mlp_norm_H": "blk.{layer}.ffn_norm.weight",
            "gate_FH": "blk.{layer}.ffn_gate.weight",
            "up_FH": "blk.{layer}.ffn_up.weight",
            "down_HF": "blk.{layer}.ffn_down.weight",
            "gate_bias_F": "blk.{layer}.ffn_gate.bias",
            "up_bias_F": "blk.{layer}.ffn_up.bias",
            "down_bias_H": "blk.{layer}.ffn_down.bias",
        },
        embedding="token_embd.weight",
        final_norm="output_norm.weight",
        head="output.weight",
    ),
    "safetensors": Naming(
        layer={
            "attention_norm_H": "model.layers.{layer}.input_layernorm.weight",
            "q_PH": "model.layers.{layer}.self_attn.q_proj.weight",
            "k_KH": "model.layers.{layer}.self_attn.k_proj.weight",
            "v_KH": "model.layers.{layer}.self_attn.v_proj.weight",
            "o_HP": "model.layers.{layer}.self_attn.o_proj.weight",
            "q_bias_P": "model.layers.{layer}.self_attn.q_proj.bias",
            "k_bias_K": "model.layers.{layer}.self_attn.k_proj.bias",
            "v_bias_K": "model.layers.{layer}.self_attn.v_proj.bias",
            "o_bias_H": "model.layers.{layer}.self_attn.o_proj.bias",
            "q_norm_D": "model.layers.{layer}.self_attn.q_norm.weight",
            "k_norm_D": "model.layers.{layer}.self_attn.k_norm.weight",
            "mlp_norm_H": "model.layers.{layer}.post_attention_layernorm.weight",
            "gate_FH": "model.layers.{layer}.mlp.gate_proj.weight",
            "up_FH": "model.layers.{layer}.mlp.up_proj.weight",
            "down_HF": "model.layers.{layer}.mlp.down_proj.weight",
            "gate_bias_F": "model.layers.{layer}.mlp.gate_proj.bias",
            "up_bias_F": "model.layers.{layer}.mlp.up_proj.bias",
            "down_bias_H": "model.layers.{layer}.mlp.down_proj.bias",
        },
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
    ),
    "llama2c": Naming(
        layer={
            "attention_norm_H": "layers.{layer}.rms_att",
            "q_PH": "layers.{layer}.wq",
            "k_KH": "layers.{layer}.wk",
            "v_KH": "layers.{layer}.wv",
            "o_HP": "layers.{layer}.wo",
            "mlp_norm_H": "layers.{layer}.rms_ffn",
            "gate_FH": "layers.{layer}.w1",
            "up_FH": "layers.{layer}.w3",
            "down_HF": "layers.{layer}.w2",
        },
        embedding="token_embedding",
        final_norm="rms_final",
        head="wcls",
    ),
}


def read_layer(checkpoint: Checkpoint, config: LlamaConfig, layer: int) -> LayerWeights:
    """Reads one layer; touches no other bytes. Raises CorruptWeights."""
    reader = LayerReader(checkpoint, config, layer)
    arrays = {field: reader.find(field) for field in LayerWeights.__dataclass_fields__}
    return LayerWeights(**arrays)  # type: ignore[arg-type]  # required fields are all found


class LayerReader:
    """Reads a layer field by field, by the names of LayerWeights; touches no other bytes.

    All methods raise CorruptWeights.
    """

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, layer: int) -> None:
        assert 0 <= layer < config.num_layers
        self._checkpoint = checkpoint
        self._names = {
            field: name.format(layer=layer)
            for field, name in NAMINGS[checkpoint.format].layer.items()
        }
        self._shapes = _layer_shapes(config)
        self._heads = _rotated_fields(config) if _interleaves_heads(checkpoint, config) else {}

    def find(self, field: str) -> Array | None:
        """As LayerWeights has the field; None where a model of this config has none."""
        return self.read(field) if field in self._shapes else None

    def read(self, field: str) -> Array:
        """A field that the model has."""
        rows = _read(self._checkpoint, self._names[field], self._shapes[field])
        return self._in_order(field, rows)

    def has_nibbles(self, fields: Sequence[str]) -> bool:
        """Whether all of these matrices have weights of 4 bits."""
        for field in fields:
            _check(self._checkpoint, self._names[field], self._shapes[field])
        return all(_has_nibbles(self._checkpoint, self._names[field]) for field in fields)

    def read_nibbles(self, field: str) -> Nibbles:
        """A matrix for which `has_nibbles`."""
        num_rows = self._shapes[field][0]
        nibbles = _read_nibbles(self._checkpoint, self._names[field], num_rows)
        return Nibbles(*(self._in_order(field, array) for array in nibbles))

    def _in_order(self, field: str, rows: Rows) -> Rows:
        num_heads = self._heads.get(field)
        return rows if num_heads is None else split_halves(rows, num_heads=num_heads)


def read_embedding(checkpoint: Checkpoint, config: LlamaConfig) -> Array:
    """Reads the token embedding [V, H]. Raises CorruptWeights."""
    name = NAMINGS[checkpoint.format].embedding
    return _read(checkpoint, name, (config.vocab_size, config.hidden_size))


def read_head(checkpoint: Checkpoint, config: LlamaConfig) -> HeadWeights:
    """Reads the final norm and the head. Raises CorruptWeights."""
    shape = (config.vocab_size, config.hidden_size)
    return HeadWeights(
        final_norm_H=read_final_norm(checkpoint, config),
        head_VH=_read(checkpoint, _head_name(checkpoint, config), shape),
    )


def read_embedding_rows(
    checkpoint: Checkpoint, config: LlamaConfig, *, count: int
) -> Iterator[Array]:
    """As `read_embedding`, at most `count` rows at a time."""
    return _read_rows(checkpoint, config, NAMINGS[checkpoint.format].embedding, count)


def read_head_rows(checkpoint: Checkpoint, config: LlamaConfig, *, count: int) -> Iterator[Array]:
    """The head as `read_head` reads it, at most `count` rows at a time."""
    return _read_rows(checkpoint, config, _head_name(checkpoint, config), count)


def head_has_nibbles(checkpoint: Checkpoint, config: LlamaConfig) -> bool:
    """Whether the weights of the head have 4 bits in the file."""
    return _has_nibbles(checkpoint, _head_name(checkpoint, config))


def read_head_nibbles(checkpoint: Checkpoint, config: LlamaConfig) -> Nibbles:
    """The head, where `head_has_nibbles`. Raises CorruptWeights."""
    name = _head_name(checkpoint, config)
    _check(checkpoint, name, (config.vocab_size, config.hidden_size))
    return _read_nibbles(checkpoint, name, config.vocab_size)


def has_nibbles(checkpoint: Checkpoint, config: LlamaConfig) -> bool:
    """Whether the weights of any matrix of the layers have 4 bits in the file. Reads headers only;
    raises CorruptWeights."""
    readers = (LayerReader(checkpoint, config, layer) for layer in range(config.num_layers))
    return any(reader.has_nibbles([field]) for reader in readers for field in MATRIX_FIELDS)


def read_final_norm(checkpoint: Checkpoint, config: LlamaConfig) -> Array:
    """Reads the final norm [H]. Raises CorruptWeights."""
    return _read(checkpoint, NAMINGS[checkpoint.format].final_norm, (config.hidden_size,))


def layer_tensors(checkpoint: Checkpoint, config: LlamaConfig, layer: int) -> tuple[str, ...]:
    """Names of what whoever holds a layer reads: of the first one with the embedding, of the last
    one with what follows it."""
    naming = NAMINGS[checkpoint.format]
    names = [naming.layer[field].format(layer=layer) for field in _layer_shapes(config)]
    if layer == 0:
        names.append(naming.embedding)
    if layer == config.num_layers - 1:
        names += [naming.final_norm, _head_name(checkpoint, config)]
    return tuple(names)


def model_sizes(checkpoint: Checkpoint, config: LlamaConfig) -> ModelSizes:
    """Measures all parts by the headers alone: no weights are read.

    Raises CorruptWeights when a tensor is missing or has another shape than the config says.
    """
    naming = NAMINGS[checkpoint.format]
    embedding_shape = (config.vocab_size, config.hidden_size)
    head = _head_name(checkpoint, config)
    return ModelSizes(
        layers=tuple(
            _part_size(
                checkpoint,
                {
                    naming.layer[field].format(layer=layer): shape
                    for field, shape in _layer_shapes(config).items()
                },
            )
            for layer in range(config.num_layers)
        ),
        embedding=_part_size(checkpoint, {naming.embedding: embedding_shape}),
        head=_part_size(
            checkpoint, {naming.final_norm: (config.hidden_size,), head: embedding_shape}
        ),
    )


def split_halves(rows: Rows, *, num_heads: int) -> Rows:
    """Reorders the rows of q or k (weight [P, H] or bias [P]) from interleaved pairs to halves.

    In the interleaved order (Llama's original code, llama2.c, GGUF's "llama") rows 2i and
    2i + 1 of a head rotate together; in Hugging Face's, rows i and i + D/2.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _interleaves_heads(checkpoint: Checkpoint, config: LlamaConfig) -> bool:
    # Converters permute for the "llama" architecture only; Qwen's rotate by halves in ggml too.
    return checkpoint.format == "llama2c" or (
        checkpoint.format == "gguf" and config.family == "llama"
    )


def _rotated_fields(config: LlamaConfig) -> dict[str, int]:
    """Fields whose rows rotate, with their numbers of heads."""
    return {
        "q_PH": config.num_heads,
        "q_bias_P": config.num_heads,
        "k_KH": config.num_kv_heads,
        "k_bias_K": config.num_kv_heads,
    }


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of those fields of LayerWeights that a model of this config has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm_H": (hidden,),
        "q_PH": (q_rows, hidden),
        "k_KH": (kv_rows, hidden),
        "v_KH": (kv_rows, hidden),
        "o_HP": (hidden, q_rows),
        "mlp_norm_H": (hidden,),
        "gate_FH": (inner, hidden),
        "up_FH": (inner, hidden),
        "down_HF": (hidden, inner),
    }
    if config.qkv_bias:
        shapes |= {"q_bias_P": (q_rows,), "k_bias_K": (kv_rows,), "v_bias_K": (kv_rows,)}
    if config.output_bias:
        shapes["o_bias_H"] = (hidden,)
    if config.qk_norm:
        shapes |= {"q_norm_D": (config.head_dim,), "k_norm_D": (config.head_dim,)}
    if config.mlp_bias:
        shapes |= {"gate_bias_F": (inner,), "up_bias_F": (inner,), "down_bias_H": (hidden,)}
    return shapes


def _head_name(checkpoint: Checkpoint, config: LlamaConfig) -> str:
    naming = NAMINGS[checkpoint.format]
    return naming.embedding if config.tied_head else naming.head


def _has_nibbles(checkpoint: Checkpoint, name: str) -> bool:
    return isinstance(checkpoint, GgufCheckpoint) and checkpoint.has_nibbles(name)


def _read_nibbles(checkpoint: Checkpoint, name: str, num_rows: int) -> Nibbles:
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint.read_nibbles(name, first=0, count=num_rows)


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    try:
        found = checkpoint.shape(name)
    except KeyError:
        raise CorruptWeights(f"{checkpoint.path}: the tensor {name!r} is missing") from None
    if found != shape:
        raise CorruptWeights(
            f"{checkpoint.path}: {name!r} has shape {found}, but the model's sizes ask for {shape}"
        )


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Array:
    _check(checkpoint, name, shape)
    return checkpoint.read(name)


def _read_rows(
    checkpoint: Checkpoint, config: LlamaConfig, name: str, count: int
) -> Iterator[Array]:
    _check(checkpoint, name, (config.vocab_size, config.hidden_size))
    for first in range(0, config.vocab_size, count):
        yield checkpoint.read_rows(name, first=first, count=min(count, config.vocab_size - first))


def _part_size(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> PartSize:
    for name, shape in shapes.items():
        _check(checkpoint, name, shape)
    return PartSize(
        file_bytes=sum(checkpoint.size_bytes(name) for name in shapes),
        num_parameters=sum(prod(shape) for shape in shapes.values()),
    )
