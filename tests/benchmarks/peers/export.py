"""Our model file as the peers want it: a Hugging Face folder, in bf16 and in W8A8 int8.

The values are those of the file, dequantised, so everybody computes the same model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.models.registry import load_config
from core.weights.open import open_checkpoint
from tests.support.transformers_models import gguf_tokenizer, transformers_model

# Weights in int8 with a scale for each output channel, activations with one for each token,
# found as they come; the head stays in bf16, as in every published checkpoint of this kind.
# Format: compressed-tensors, "int-quantized".
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def export(model: Path, folder: Path) -> dict[str, Path]:
    """Writes `folder`/bf16 and `folder`/w8a8 unless they are there; returns where, by format."""
    targets = {name: folder / name for name in ("bf16", "w8a8")}
    if all((target / "config.json").exists() for target in targets.values()):
        return targets
    for target in targets.values():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    checkpoint = open_checkpoint(model)
    try:
        reference = transformers_model(checkpoint, load_config(checkpoint))
    finally:
        checkpoint.close()
    state, config = _bf16_state(reference), reference.config.to_dict() | {"dtype": "bfloat16"}
    config["architectures"] = [type(reference).__name__]
    backend = gguf_tokenizer(model)
    for target in targets.values():
        backend.save(str(target / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
    _write(targets["bf16"], state, config)
    _write(targets["w8a8"], _quantised(state), config | {"quantization_config": _W8A8})
    return targets


def quantise_rows(weight: Any) -> tuple[Any, Any]:
    """Rounds each row to int8 with a scale of its own, the largest value at 127."""
    import torch

    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def _bf16_state(reference: Any) -> dict[str, Any]:
    import torch

    tied = reference.config.tie_word_embeddings
    return {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in reference.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def _quantised(state: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    result = {}
    for name, tensor in state.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        values, scale = quantise_rows(tensor)
        result[name] = values.contiguous()
        result[name + "_scale"] = scale.to(torch.bfloat16)
    return result


def _write(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    # Last: its presence says that the folder is whole.
    (folder / "config.json").write_text(json.dumps(config, indent=1))
