"""Hugging Face folders: safetensors, their index, and the configurations beside them."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from random import Random

from core.errors import PenstockError
from core.models.registry import load_config
from core.weights.safetensors import SafetensorsCheckpoint
from tests.fuzz.damage import any_damage
from tests.fuzz.json_damage import damage_json
from tests.fuzz.scratch import fresh_folder
from tests.fuzz.sections import damage_one, join, split
from tests.fuzz.target import FuzzTarget
from tests.support.models import TinyModel, write_hugging_face

_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
_KEYS = (
    "attention_bias",
    "head_dim",
    "layer_types",
    "max_window_layers",
    "num_hidden_layers",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
    "weight_map",
)


def make_target() -> FuzzTarget:
    sizes = {"num_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    tiny = TinyModel(**sizes, num_kv_heads=1, head_dim=4, vocab_size=8)
    qwen = TinyModel(**sizes, num_kv_heads=1, head_dim=4, vocab_size=8, family="qwen2")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    stretched = TinyModel(**sizes, num_kv_heads=2, head_dim=4, vocab_size=8, rope_parameters=yarn)
    return FuzzTarget(
        try_input=_open_and_read,
        refusals=(PenstockError,),
        seeds=[_folder(tiny, "F32"), _folder(qwen, "BF16"), _folder(stretched, "F16")],
        mutate=partial(
            damage_one, damages=(_damage_weights, _damage_json, _damage_json, _damage_json)
        ),
    )


def _open_and_read(data: bytes) -> None:
    folder = fresh_folder()
    for name, content in zip(_FILES, split(data, len(_FILES)), strict=True):
        if content:
            (folder / name).write_bytes(content)
    checkpoint = SafetensorsCheckpoint(folder)
    try:
        for name in checkpoint.tensor_names:
            _read(checkpoint, name)
        load_config(checkpoint)
    finally:
        checkpoint.close()


def _read(checkpoint: SafetensorsCheckpoint, name: str) -> None:
    shape = checkpoint.shape(name)
    try:
        if checkpoint.read(name).shape != shape:
            raise AssertionError(f"{name!r} is not of the shape it says")
        if len(shape) == 2 and shape[0]:
            checkpoint.read_rows(name, first=shape[0] - 1, count=1)
    except PenstockError:  # a type that is not read, say; the others can still be
        return


def _folder(model: TinyModel, dtype: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = write_hugging_face(Path(name), model, dtype=dtype)
        contents = [path.read_bytes() for path in (folder / _FILES[0], folder / _FILES[1])]
    weight_map = dict.fromkeys(["model.norm.weight"], _FILES[0])
    others = {"eos_token_id": [2, 3]}, {"weight_map": weight_map}
    return join([*contents, *(json.dumps(other).encode() for other in others)])


def _damage_json(text: bytes, random: Random) -> bytes:
    return damage_json(text, random, keys=_KEYS)


def _damage_weights(data: bytes, random: Random) -> bytes:
    """Damages the header and sets its length right, mostly."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3 or not 0 < length < len(data):
        return any_damage(data, random)
    header = damage_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
