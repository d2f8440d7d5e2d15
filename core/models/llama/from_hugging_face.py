"""LlamaConfig from config.json and generation_config.json of a Hugging Face folder.

What absent fields mean is read off transformers' own configuration classes (release 5,
whose files have `rope_parameters`; older files have `rope_theta` and `rope_scaling`).
"""

from __future__ import annotations

from dataclasses import dataclass

from core.models.llama.config import LlamaConfig, RopeScaling
from core.models.llama.fields import MAX_LAYERS, Fields, unique
from core.weights.checkpoint import Checkpoint
from core.weights.safetensors import read_json


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How a model type departs from Llama."""

    qkv_bias: bool | None = False  # None: as `attention_bias` says, on the output as well
    mlp_bias: bool = False  # whether the field `mlp_bias` counts
    qk_norm: bool = False
    head_dim: int | None = None  # where the file does not say; None: hidden size / heads
    context_length: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None


_FAMILIES = {
    "llama": _Family(
        qkv_bias=None, mlp_bias=True, context_length=2048, bos_token_id=1, eos_token_id=2
    ),
    "mistral": _Family(context_length=4096 * 32, bos_token_id=1, eos_token_id=2),
    "qwen2": _Family(qkv_bias=True, context_length=32768),
    "qwen3": _Family(qkv_bias=None, qk_norm=True, head_dim=128, context_length=32768),
}
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def config_from_hugging_face(checkpoint: Checkpoint) -> LlamaConfig:
    """Raises CorruptWeights where the folder is inconsistent or not supported."""
    fields = Fields(checkpoint)
    model_type = fields.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise fields.error(
            f"the model type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}"
        )
    fields.require_default("hidden_act", "silu", "swish")
    fields.require_default("quantization_config")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    attention_bias = family.qkv_bias is None and fields.flag("attention_bias")
    return LlamaConfig(
        family=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
        head_dim=fields.integer(
            "head_dim", default=family.head_dim or max(1, hidden_size // num_heads)
        ),
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer("max_position_embeddings", default=family.context_length),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=_rope_fields(fields).number("rope_theta", default=_rope_theta(fields)),
        rope_scaling=_rope_scaling(fields),
        qkv_bias=bool(family.qkv_bias) or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        windows=_windows(fields, model_type, num_layers),
        tied_head=fields.flag("tie_word_embeddings")
        or "lm_head.weight" not in checkpoint.tensor_names,
        bos_token_id=_bos_token_id(fields, family),
        eos_token_ids=_eos_token_ids(fields, family),
    )


def _rope_fields(fields: Fields) -> Fields:
    """The rotary options, wherever the file's age puts them."""
    options = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(options, dict):
        raise fields.error(f"rope_parameters is {options!r}; an object is expected")
    nested = [key for key, value in options.items() if isinstance(value, dict)]
    if nested:
        raise fields.error(
            f"rope_parameters that differ by layer type ({nested[0]}) are not supported"
        )
    return Fields(fields.checkpoint, options)


def _rope_theta(fields: Fields) -> float:
    return fields.number("rope_theta", default=10000.0)


def _rope_scaling(fields: Fields) -> RopeScaling | None:
    options = _rope_fields(fields)
    for holder in (fields, options):
        holder.require_default("partial_rotary_factor", 1.0)
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=options.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=options.number("factor"),
            low_freq_factor=options.number("low_freq_factor"),
            high_freq_factor=options.number("high_freq_factor"),
            original_context_length=_original_context_length(fields, options),
        )
    if kind == "yarn":
        return _yarn(fields, options)
    raise fields.error(f"rope scaling {kind!r} is not supported; supported: linear, llama3, yarn")


def _yarn(fields: Fields, options: Fields) -> RopeScaling:
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", True)):
        options.require_default(key, default)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        options.require_default(key)
    return RopeScaling(
        kind="yarn",
        factor=options.number("factor"),
        original_context_length=_original_context_length(fields, options),
    )


def _original_context_length(fields: Fields, options: Fields) -> int:
    """The same precedence as transformers': the outer field, the inner, the context."""
    key = "original_max_position_embeddings"
    if fields.get(key) is not None:
        return fields.integer(key)
    return options.integer(key, default=fields.integer("max_position_embeddings"))


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows: all layers of Mistral; those that Qwen's `layer_types` name, or the ones
    from `max_window_layers` on."""
    if model_type == "llama":
        return (None,) * num_layers
    # An explicit null switches the window off; only absence means the default.
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return (None,) * num_layers
    if model_type == "mistral":
        fields.require_default("layer_types", ["sliding_attention"] * num_layers)
        return (fields.integer("sliding_window", default=_DEFAULT_WINDOW),) * num_layers
    if not fields.flag("use_sliding_window"):
        return (None,) * num_layers
    window = fields.integer("sliding_window", default=_DEFAULT_WINDOW)
    return tuple(window if sliding else None for sliding in _sliding_layers(fields, num_layers))


def _sliding_layers(fields: Fields, num_layers: int) -> list[bool]:
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        if not isinstance(first, int) or first < 0:
            raise fields.error(f"max_window_layers is {first!r}; a number of layers is expected")
        return [layer >= first for layer in range(num_layers)]
    kinds = ("full_attention", "sliding_attention")
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(kind not in kinds for kind in layer_types)
    ):
        raise fields.error(f"layer_types has to hold {num_layers} times one of {', '.join(kinds)}")
    return [kind == "sliding_attention" for kind in layer_types]


def _bos_token_id(fields: Fields, family: _Family) -> int | None:
    if "bos_token_id" not in fields.values:
        return family.bos_token_id
    return next(iter(fields.token_ids("bos_token_id")), None)


def _eos_token_ids(fields: Fields, family: _Family) -> tuple[int, ...]:
    """The ids of generation_config.json, which generation goes by, then those of config.json."""
    path = fields.checkpoint.path / "generation_config.json"
    generation: tuple[int, ...] = ()
    if path.exists():
        generation = Fields(fields.checkpoint, read_json(path)).token_ids("eos_token_id")
    if "eos_token_id" in fields.values:
        return unique(generation, fields.token_ids("eos_token_id"))
    default = () if family.eos_token_id is None else (family.eos_token_id,)
    return generation or default
