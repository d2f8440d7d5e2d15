"""The shape of a Llama-architecture decoder, whatever file it came from.

One dataclass covers SmolLM2, TinyLlama, Llama 2 and 3, Mistral, Qwen2/2.5 and
Qwen3: they differ in sizes, biases, norms on q and k, windows and rope scaling.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `kind` is "linear" (all frequencies divided by `factor`), "llama3" (only low
    frequencies; Llama 3.1 technical report and reference code) or "yarn".
    `factors`, where a file carries explicit per-frequency divisors (GGUF
    `rope_freqs.weight`), overrides the formula: head_dim // 2 floats.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and options of a decoder.

    Rotary embedding rotates the two halves of a head (the Hugging Face
    convention): readers un-permute q and k of files that interleave pairs.
    """

    family: str  # "llama", "mistral", "qwen2" or "qwen3": for people and metrics only
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # bias on the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before rotary (Qwen3)
    # Positions a layer attends to, itself included; None: all before it. One entry a layer.
    windows: tuple[int | None, ...] = ()
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
