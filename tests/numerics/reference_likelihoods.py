"""How likely transformers in fp32 finds WikiText-2: recorded, since it takes ten minutes of a core.

`python -m tests.numerics.reference_likelihoods` records it anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from services.local.fetch import resolve_model
from tests.numerics.conftest import (
    WINDOW,
    RealModel,
    TransformersModel,
    encode_wikitext,
    log_likelihood,
)
from tests.support.transformers_models import gguf_llama_model

PATH = Path(__file__).parents[1] / "data" / "smollm2_likelihoods.json"
MODEL = "smollm2-135m-instruct"
NUM_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class ReferenceLikelihoods:
    """Of the first windows of WikiText-2's test text, each without its first token, in nats."""

    model: str
    transformers: str  # the version that computed them
    window: int  # tokens
    sums: list[float]


def read() -> ReferenceLikelihoods:
    return ReferenceLikelihoods(**json.loads(PATH.read_text(encoding="utf-8")))


def record() -> None:
    model = RealModel(resolve_model(MODEL))
    reference = TransformersModel(gguf_llama_model(model.path))
    ids = encode_wikitext(model)[: NUM_WINDOWS * WINDOW]
    sums = []
    for number, token_ids_T in enumerate(ids.reshape(NUM_WINDOWS, WINDOW), start=1):
        sums.append(log_likelihood(reference, token_ids_T))
        print(f"window {number} of {NUM_WINDOWS}: {sums[-1]:.3f} nats", flush=True)
    result = ReferenceLikelihoods(
        model=MODEL, transformers=version("transformers"), window=WINDOW, sums=sums
    )
    PATH.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    model.close()


if __name__ == "__main__":
    record()
