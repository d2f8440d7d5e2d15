"""What layers cost: measured, or estimated from their shapes."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Seconds of a typical micro-batch and bytes, layer by layer.

    `head` is the last stage's: final norm, product with the vocabulary, sampling.
    """

    layer_s: tuple[float, ...]
    layer_bytes: tuple[int, ...]
    kv_block_bytes: tuple[int, ...]  # of one KV block, layer by layer
    embedding_s: float = 0.0
    embedding_bytes: int = 0
    head_s: float = 0.0
    head_bytes: int = 0

    def __post_init__(self) -> None:
        num_layers = len(self.layer_s)
        for name in ("layer_s", "layer_bytes", "kv_block_bytes"):
            values = getattr(self, name)
            if len(values) != num_layers or not values or min(values) < 0:
                raise InvalidInput(name, values, f"{num_layers} numbers, none negative")

    @property
    def num_layers(self) -> int:
        return len(self.layer_s)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder, as its configuration has them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int  # heads * head_dim
    kv_size: int  # KV heads * head_dim
    vocab_size: int
    # Of the layers' products: 1.06 for int8 with its scales, 2 for bf16, 4 for fp32.
    bytes_per_weight: float
    bytes_per_head_weight: float | None = None  # None: as the layers'
    bytes_per_embedding: int = 2  # of one element
    bytes_per_kv: float = 2  # of one element
    kv_block_size: int = 16


# Measured on one core with 64 rows of about 80 positions of SmolLM2-135M, whose 15 layers of
# 3.54 M weights take 8.8 ms in products and 5.4 ms in attention, and whose head of 28.3 M
# weights takes 5.5 ms: seconds per weight, and attention in weights per query element.
_LAYER_S_PER_WEIGHT = 8.8e-3 / (15 * 3.54e6)
_HEAD_S_PER_WEIGHT = 5.5e-3 / 28.3e6
_ATTENTION_WEIGHTS_PER_QUERY_ELEMENT = 5.4e-3 / 15 / _LAYER_S_PER_WEIGHT / 576


def estimate_costs(shape: DecoderShape) -> ModelCosts:
    """Estimates costs from sizes. Two stages of SmolLM2-135M balance at 18 and 12 layers."""
    attention = 2 * shape.hidden_size * (shape.query_size + shape.kv_size)
    layer_weights = attention + 3 * shape.hidden_size * shape.intermediate_size
    vocabulary_weights = shape.vocab_size * shape.hidden_size
    layer_work = layer_weights + _ATTENTION_WEIGHTS_PER_QUERY_ELEMENT * shape.query_size
    head_bytes = shape.bytes_per_head_weight or shape.bytes_per_weight
    kv_block_bytes = int(2 * shape.kv_size * shape.bytes_per_kv * shape.kv_block_size)
    return ModelCosts(
        layer_s=(layer_work * _LAYER_S_PER_WEIGHT,) * shape.num_layers,
        layer_bytes=(int(layer_weights * shape.bytes_per_weight),) * shape.num_layers,
        kv_block_bytes=(kv_block_bytes,) * shape.num_layers,
        embedding_bytes=vocabulary_weights * shape.bytes_per_embedding,
        head_s=vocabulary_weights * _HEAD_S_PER_WEIGHT,
        head_bytes=int(vocabulary_weights * head_bytes),
    )
