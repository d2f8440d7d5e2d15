"""A sequence whose activations are no numbers gets no token, and the others get theirs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.pipeline.batch import NO_TOKEN
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import OpenModel
from tests.support.chain import Chain, Run

OpenOne = Callable[[str], OpenModel]
GREEDY = SamplingParameters(max_tokens=4, temperature=0.0)
DRAWN = SamplingParameters(max_tokens=4, temperature=1.0, seed=7)
WITH_LOGPROBS = SamplingParameters(max_tokens=4, temperature=0.0, logprobs=2)
PROMPT = [5, 6, 7]
# Of the wire's codecs: float32, the bit patterns of bfloat16, and what int8 has for both.
NAN = {"f32": np.float32(np.nan), "bf16": np.uint16(0x7FC0), "int8": np.uint8(0x80)}
INFINITY = {"f32": np.float32(-np.inf), "bf16": np.uint16(0x7F80), "int8": np.uint8(0x80)}


def tokens_after(chain: Chain, *, spoiled: dict[int, object]) -> tuple[int, ...]:
    """Tokens of four sequences, after an element of some of them has become another one on the
    wire: the key is the sequence."""
    for slot, sampling in enumerate((GREEDY, DRAWN, GREEDY, WITH_LOGPROBS)):
        chain.start(slot, sampling)
    batch = chain._micro_batch([Run(slot, PROMPT, num_samples=1) for slot in range(4)])
    first, last = chain.engines
    hidden_TH = first.step(batch, None).hidden_TH
    assert hidden_TH is not None
    hidden_TH = hidden_TH.copy()
    for slot, value in spoiled.items():
        hidden_TH[slot * len(PROMPT) + 1, 3] = value  # seen by the row after it, through attention
    sampled = last.step(batch, hidden_TH).sampled
    assert sampled is not None
    for slot in range(4):
        chain.end(slot)
    chain.flush()
    return sampled.token_ids


@pytest.mark.parametrize(
    ("number_format", "wire"),
    [("fp32", "f32"), ("bf16", "bf16"), ("int8", "bf16"), ("bf16", "int8"), ("int8", "int8")],
)
def test_no_token_comes_of_what_is_not_finite(
    number_format: str, wire: str, open_model: OpenOne
) -> None:
    chain = open_model("llama").chain(num_stages=2, number_format=number_format, wire=wire)
    expected = tokens_after(chain, spoiled={})
    assert NO_TOKEN not in expected
    for kind in (NAN, INFINITY):
        for slots in ((0, 1), (2, 3)):
            tokens = tokens_after(chain, spoiled=dict.fromkeys(slots, kind[wire]))
            for slot, token_id in enumerate(tokens):
                assert token_id == (NO_TOKEN if slot in slots else expected[slot])
    assert tokens_after(chain, spoiled={}) == expected
