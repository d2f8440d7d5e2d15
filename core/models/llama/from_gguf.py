"""LlamaConfig from the metadata of a GGUF file.

Keys: `docs/gguf.md` of ggml and the `gguf` library's constants.
"""

from __future__ import annotations

from core.models.llama.config import LlamaConfig, RopeScaling
from core.models.llama.fields import MAX_LAYERS, Fields, unique
from core.weights.checkpoint import Checkpoint

# "llama" also covers Mistral, SmolLM and TinyLlama.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FREQUENCIES = "rope_freqs.weight"
# Options of other models of these architectures, with the values that mean "off".
_UNSUPPORTED = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window_pattern": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}


def config_from_gguf(checkpoint: Checkpoint) -> LlamaConfig:
    """Raises CorruptWeights where the file is inconsistent or not supported."""
    fields = Fields(checkpoint)
    family = fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise fields.error(
            f"the architecture {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    fields.require_default("split.count", 0, 1)
    for key, allowed in _UNSUPPORTED.items():
        fields.require_default(f"{family}.{key}", *allowed)
    names = set(checkpoint.tensor_names)
    num_heads = fields.integer(f"{family}.attention.head_count")
    head_dim = _head_dim(fields, family, num_heads)
    num_layers = fields.integer(f"{family}.block_count", most=MAX_LAYERS)
    return LlamaConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=fields.integer(f"{family}.embedding_length"),
        intermediate_size=fields.integer(f"{family}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.integer(f"{family}.attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(fields),
        context_length=fields.integer(f"{family}.context_length"),
        norm_eps=fields.number(f"{family}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{family}.rope.freq_base", default=10000.0),
        rope_scaling=_rope_scaling(fields, family, head_dim),
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        windows=(_window(fields, family),) * num_layers,
        tied_head="output.weight" not in names,
        bos_token_id=next(iter(fields.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=unique(
            fields.token_ids("tokenizer.ggml.eos_token_id"),
            fields.token_ids("tokenizer.ggml.eot_token_id"),
        ),
    )


def _head_dim(fields: Fields, family: str, num_heads: int) -> int:
    hidden_size = fields.integer(f"{family}.embedding_length")
    head_dim = fields.integer(
        f"{family}.attention.key_length", default=max(1, hidden_size // num_heads)
    )
    fields.require_default(f"{family}.attention.value_length", head_dim)
    fields.require_default(f"{family}.rope.dimension_count", head_dim)  # no partial rotary
    return head_dim


def _window(fields: Fields, family: str) -> int | None:
    """Mistral's window, the same for all layers; Qwen's files do not say which layers have one."""
    key = f"{family}.attention.sliding_window"
    if family != "llama":
        fields.require_default(key, 0)
    return fields.integer(key) if fields.get(key, 0) else None


def _vocab_size(fields: Fields) -> int:
    if "token_embd.weight" not in fields.checkpoint.tensor_names:
        raise fields.error("the tensor 'token_embd.weight' is missing")
    return fields.checkpoint.shape("token_embd.weight")[0]


def _rope_scaling(fields: Fields, family: str, head_dim: int) -> RopeScaling | None:
    prefix = f"{family}.rope.scaling"
    kind = fields.get(f"{prefix}.type", "none")
    if ROPE_FREQUENCIES in fields.checkpoint.tensor_names:
        if kind != "none":
            raise fields.error(
                f"rope scaling {kind!r} together with {ROPE_FREQUENCIES} is not supported"
            )
        return _explicit_factors(fields, head_dim)
    if kind == "none":
        return _linear(fields, f"{family}.rope.scale_linear")  # as files of 2023 say it
    if kind == "linear":
        return _linear(fields, f"{prefix}.factor")
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=fields.number(f"{prefix}.factor"),
            original_context_length=fields.integer(
                f"{prefix}.original_context_length",
                default=fields.integer(f"{family}.context_length"),
            ),
        )
    raise fields.error(
        f"rope scaling {kind!r} is not supported; supported: linear, yarn, {ROPE_FREQUENCIES}"
    )


def _linear(fields: Fields, key: str) -> RopeScaling | None:
    factor = fields.number(key, default=1.0)
    return None if factor == 1.0 else RopeScaling(kind="linear", factor=factor)


def _explicit_factors(fields: Fields, head_dim: int) -> RopeScaling:
    """Divisors of the frequencies, as converters of Llama 3.1 and later write them."""
    shape = fields.checkpoint.shape(ROPE_FREQUENCIES)
    if shape != (head_dim // 2,):
        raise fields.error(f"{ROPE_FREQUENCIES} has shape {shape}; {(head_dim // 2,)} is expected")
    factors = tuple(float(factor) for factor in fields.checkpoint.read(ROPE_FREQUENCIES))
    if not all(0 < factor < 1e30 for factor in factors):
        raise fields.error(f"{ROPE_FREQUENCIES} holds values that are not positive numbers")
    return RopeScaling(kind="llama3", factors=factors)
