"""A mesh whose second stage gets other weights, and requests whose answers tell which it had."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from penstock.v1 import generation_pb2 as pb

from tests.support.client import make_request
from tests.support.models import TinyModel, random_weights, write_safetensors, write_servable

MODEL = TinyModel(context_length=8192)
OPTIONS = ("--split", "0:2,2:4", "--kv-memory", "8MiB", "--speculation", "0", "--dtype", "bf16")
LONG_TOKENS, LONG_TIMEOUT_S = 2000, 300.0


def write_models(folder: Path) -> Path:
    """Three models of one shape: `new` and `bad` differ from `old` in the second stage alone."""
    old = random_weights(MODEL)
    other = random_weights(dataclasses.replace(MODEL, seed=1))
    second = {name: other[name] for name in old if name.startswith(("model.layers.2.", "lm_head"))}
    bad = {"lm_head.weight": np.full_like(old["lm_head.weight"], 3e38)}  # logits overflow
    for name, changes in (("old", {}), ("new", second), ("bad", bad)):
        write_servable(folder / name, MODEL)
        write_safetensors(folder / name / "model.safetensors", old | changes)
    return folder


def request(number: int, num_tokens: int = 24) -> pb.GenerateRequest:
    """Greedy ones and seeded ones, each another one."""
    drawn = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
    sampling = drawn | {"max_tokens": num_tokens, "ignore_eos": True}
    return make_request(token_ids=[5, 6, 7 + number], sampling=sampling)


def rest_of(call: Iterable[pb.GenerateResponse]) -> list[int]:
    """The tokens that a stream still brings."""
    return [token for message in call for token in message.token_ids]
