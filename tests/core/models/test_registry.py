from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import CorruptWeights
from core.models.llama.config import LlamaConfig, RopeScaling
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from tests.support.models import (
    TINY_MODELS,
    TinyModel,
    hugging_face_config,
    llama3_factors,
    write_gguf,
    write_hugging_face,
    write_llama2c,
)

LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context_length=64,
)
FULL = (None,) * 4
EXPECTED = {
    "llama": {},
    "llama-tied": {"tied_head": True, "num_kv_heads": 4},
    "llama-wide-heads": {"head_dim": 32, "num_kv_heads": 1},
    "llama-biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama-linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "mistral": {"family": "mistral", "windows": (24,) * 4},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tied_head": True, "rope_theta": 1e6},
    "qwen2-windows": {"family": "qwen2", "qkv_bias": True, "windows": (None, None, 24, 24)},
    "qwen2-yarn": {
        "family": "qwen2",
        "qkv_bias": True,
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context_length=128),
    },
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32, "rope_theta": 1e6},
}


def _expected(name: str) -> LlamaConfig:
    plain = LlamaConfig(
        family="llama",
        num_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=272,
        context_length=512,
        norm_eps=1e-6,
        rope_theta=10000.0,
        windows=FULL,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return replace(plain, **EXPECTED[name])


def _load(path: Path) -> LlamaConfig:
    checkpoint = open_checkpoint(path)
    try:
        return load_config(checkpoint)
    finally:
        checkpoint.close()


def _hugging_face(tmp_path: Path, model: TinyModel, **config: Any) -> LlamaConfig:
    """Loads a folder whose config.json is changed; `...` removes a field."""
    write_hugging_face(tmp_path, model)
    fields = hugging_face_config(model) | config
    fields = {key: value for key, value in fields.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return _load(tmp_path)


def _gguf(tmp_path: Path, model: TinyModel, **extra: Any) -> LlamaConfig:
    """Loads a GGUF file with more key-values; `__` stands for a dot."""
    named = {key.replace("__", "."): value for key, value in extra.items()}
    return _load(write_gguf(tmp_path / "m.gguf", model, extra=named))


def test_every_kind_of_tiny_model_is_covered() -> None:
    assert EXPECTED.keys() == TINY_MODELS.keys()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_hugging_face_folders(tmp_path: Path, name: str) -> None:
    assert _load(write_hugging_face(tmp_path, TINY_MODELS[name])) == _expected(name)


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name != "qwen2-windows"])
def test_gguf_files(tmp_path: Path, name: str) -> None:
    model, expected = TINY_MODELS[name], _expected(name)
    found = _load(write_gguf(tmp_path / "m.gguf", model))
    if name == "mistral":  # ggml calls it a Llama
        expected = replace(expected, family="llama")
    if name == "llama3":
        factors = tuple(float(factor) for factor in llama3_factors(model))
        expected = replace(expected, rope_scaling=RopeScaling(kind="llama3", factors=factors))
    assert replace(found, norm_eps=1e-6) == expected
    assert found.norm_eps == np.float32(1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files(tmp_path: Path, tied: bool) -> None:
    found = _load(write_llama2c(tmp_path / "m.bin", TinyModel(tied_head=tied)))
    plain = _expected("llama")
    assert found == replace(plain, norm_eps=1e-5, tied_head=tied, eos_token_ids=(2, 1))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2-windows", "qwen3"])
def test_folders_that_transformers_saves_read_as_it_understands_them(
    tmp_path: Path, name: str
) -> None:
    from transformers import AutoConfig

    expected = _expected(name)
    saved = AutoConfig.for_model(**hugging_face_config(TINY_MODELS[name]))
    write_hugging_face(tmp_path, TINY_MODELS[name])
    saved.save_pretrained(tmp_path)
    assert _load(tmp_path) == expected
    assert saved.rope_parameters["rope_theta"] == expected.rope_theta
    if name == "qwen2-windows":
        windows = [
            saved.sliding_window if kind == "sliding_attention" else None
            for kind in saved.layer_types
        ]
        assert tuple(windows) == expected.windows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fields_that_are_absent_mean_what_they_mean_to_transformers(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig

    model = TinyModel(
        family=family,
        tied_head=False,
        head_dim=128 if family == "qwen3" else 16,
        sliding_window=None,
    )
    absent = dict.fromkeys(
        [
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_parameters",
            "hidden_act",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "sliding_window",
            "attention_bias",
            "mlp_bias",
        ],
        ...,
    )
    found = _hugging_face(tmp_path, model, **absent)
    theirs = AutoConfig.from_pretrained(tmp_path)
    eos = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
    assert found.context_length == theirs.max_position_embeddings
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (found.bos_token_id, found.eos_token_ids) == (theirs.bos_token_id, eos)
    assert found.windows == (getattr(theirs, "sliding_window", None),) * 4


def test_older_rope_fields_are_understood(tmp_path: Path) -> None:
    scaling = dict(TINY_MODELS["llama3"].rope_parameters)
    found = _hugging_face(
        tmp_path,
        TINY_MODELS["llama3"],
        rope_parameters=...,
        rope_theta=500000.0,
        rope_scaling=scaling,
    )
    assert found == _expected("llama3")
    del scaling["rope_type"]
    linear = _hugging_face(
        tmp_path,
        TinyModel(),
        rope_parameters=...,
        rope_theta=5e5,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    assert (linear.rope_theta, linear.rope_scaling) == (
        5e5,
        RopeScaling(kind="linear", factor=2.0),
    )


def test_the_original_context_is_the_context_where_it_is_not_given(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    found = _hugging_face(tmp_path, TinyModel(), rope_parameters=yarn)
    assert found.rope_scaling == RopeScaling(kind="yarn", factor=2.0, original_context_length=512)
    outer = _hugging_face(
        tmp_path,
        TinyModel(),
        rope_parameters=yarn | {"original_max_position_embeddings": 99},
        original_max_position_embeddings=256,
    )
    assert outer.rope_scaling is not None
    assert outer.rope_scaling.original_context_length == 256


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, FULL),
        ({"use_sliding_window": True, "sliding_window": None}, FULL),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, FULL),  # from layer 28 on
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_qwen_windows(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert _hugging_face(tmp_path, TINY_MODELS["qwen3"], **changes).windows == windows


def test_a_null_window_of_mistral_is_none(tmp_path: Path) -> None:
    assert _hugging_face(tmp_path, TINY_MODELS["mistral"], sliding_window=None).windows == FULL


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, (9, 7)),
        ({"eos_token_id": None}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": ...}, None, (2,)),  # transformers' default for Llama
        ({"eos_token_id": ...}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": 0}, {}, (0,)),
    ],
)
def test_end_of_sequence_tokens(
    tmp_path: Path, config: dict[str, Any], generation: Any, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert _hugging_face(tmp_path, TinyModel(), **config).eos_token_ids == expected


def test_gguf_end_of_turn_ends_as_well(tmp_path: Path) -> None:
    found = _gguf(tmp_path, TinyModel(), tokenizer__ggml__eot_token_id=5)
    assert found.eos_token_ids == (2, 5)


def test_a_head_that_is_missing_is_tied(tmp_path: Path) -> None:
    model = TinyModel(tied_head=True)
    assert _hugging_face(tmp_path, model, tie_word_embeddings=...).tied_head


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": ...}, "None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 5}, "'model.layers.4.input_layernorm.weight' is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 2.5}, "hidden_size is 2.5"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 128}, "has shape (64,)"),
        ({"vocab_size": 271}, "has shape (272, 64)"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4 heads"),
        ({"head_dim": 15}, "15 cannot be rotated"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"attention_bias": True}, "q_proj.bias' is missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": 272}, "special token 272 is outside"),
        ({"rope_parameters": 7}, "rope_parameters is 7"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}},
            "beta_fast is 16",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "mscale is 0.7",
        ),
    ],
)
def test_folders_that_we_cannot_compute_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CorruptWeights) as refusal:
        _hugging_face(tmp_path, TinyModel(), **changes)
    assert reason in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}),
    ],
)
def test_windows_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CorruptWeights, match=r"layer_types|max_window_layers|sliding_window"):
        _hugging_face(tmp_path, TINY_MODELS[name], **{"sliding_window": 8} | changes)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"general__architecture": "gemma3"}, "'gemma3' is not supported"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8"),
        ({"llama__final_logit_softcapping": 30.0}, "softcapping is 30.0"),
        ({"llama__attention__causal": False}, "causal is False"),
        ({"llama__attention__value_length": 8}, "value_length is 8"),
        ({"llama__rope__dimension_count": 8}, "dimension_count is 8"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope' is not supported"),
        ({"llama__rope__scaling__yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0"),
        ({"llama__attention__sliding_window_pattern": 2}, "sliding_window_pattern is 2"),
        ({"llama__block_count": 0}, "block_count is 0"),
        ({"llama__block_count": 5}, "'blk.4.attn_norm.weight' is missing"),
        ({"llama__attention__head_count": [4, 2, 4, 4]}, "head_count is an array"),
        ({"llama__expert_count": [1, 2]}, "expert_count is an array"),
        ({"general__architecture": [1, 2]}, "general.architecture is an array"),
        ({"llama__embedding_length": 32}, "shape"),
        ({"llama__attention__layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0"),
        ({"split__count": 3}, "split.count is 3"),
        ({"tokenizer__ggml__eos_token_id": 272}, "special token 272"),
    ],
)
def test_gguf_files_that_we_cannot_compute_are_refused_by_name(
    tmp_path: Path, extra: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CorruptWeights) as refusal:
        _gguf(tmp_path, TinyModel(), **extra)
    assert reason in str(refusal.value)


def test_a_window_in_a_qwen_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptWeights, match="sliding_window is 24"):
        _gguf(tmp_path, TINY_MODELS["qwen2"], qwen2__attention__sliding_window=24)
