"""The engine on CUDA against the engine on the CPU: decodes, prefill chunks, several sequences.

Sizes are small: where there is no device all of this runs under numba's simulator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from core.engine.cuda_backend import CudaBackend
from core.engine.engine import Engine, EngineSettings
from core.errors import Exhausted, ProtocolViolation
from core.kernels.cuda_device import CudaDevice, Device
from core.models.registry import load_config
from core.pipeline.plan import StageSlice
from core.sampling.parameters import SamplingParameters
from core.weights.open import open_checkpoint
from tests.support.chain import Chain, Run
from tests.support.cuda import SIMULATED, needs_cuda
from tests.support.models import TinyModel, write_hugging_face

pytestmark = [pytest.mark.cuda, needs_cuda]

SMALL: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=24,
    intermediate_size=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    vocab_size=53,
    context_length=64,
)
MODELS = {
    "llama-biases": TinyModel(
        **SMALL | dict(num_heads=4, num_kv_heads=2), attention_bias=True, mlp_bias=True
    ),
    "mistral": TinyModel(**SMALL, family="mistral", sliding_window=5),
    "qwen2": TinyModel(**SMALL, family="qwen2", tied_head=True),
    "qwen3": TinyModel(**SMALL, family="qwen3"),
}
TOKENS = [int(token) for token in np.random.default_rng(2).integers(0, 53, 12)]
GREEDY = SamplingParameters(max_tokens=2, temperature=0.0)
MakeChain = Callable[..., Chain]


def make_device() -> Device:
    if not SIMULATED:
        return CudaDevice()
    from tests.support.simulated_device import SimulatedDevice

    return SimulatedDevice()


@pytest.fixture(scope="module")
def make_chain(tmp_path_factory: pytest.TempPathFactory) -> MakeChain:
    @functools.cache
    def open_one(name: str) -> Any:
        path = write_hugging_face(tmp_path_factory.mktemp("cuda") / name, MODELS[name])
        checkpoint = open_checkpoint(path)
        return checkpoint, load_config(checkpoint)

    @functools.cache
    def make(name: str, on: str, **options: Any) -> Chain:
        backend = functools.partial(CudaBackend, device=make_device()) if on == "cuda" else None
        return Chain(
            *open_one(name),
            num_slots=4,
            num_kv_blocks=12,
            max_rows=8,
            make_backend=backend,
            **options,
        )

    return make


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_chunks_over_two_stages_equal_those_of_the_cpu(
    name: str, make_chain: MakeChain
) -> None:
    expected = make_chain(name, "cpu").logits(TOKENS, chunk=8)
    actual = make_chain(name, "cuda", num_stages=2).logits(TOKENS, chunk=7)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_bf16_logits_agree_with_those_of_the_cpu(wire: str, make_chain: MakeChain) -> None:
    options = dict(number_format="bf16", wire=wire)
    expected = make_chain("qwen2", "cpu", **options).logits(TOKENS, chunk=8)
    actual = make_chain("qwen2", "cuda", num_stages=2, **options).logits(TOKENS, chunk=8)
    assert np.abs(actual - expected).mean() < 0.02 * np.abs(expected).mean()
    assert np.mean(actual.argmax(axis=1) == expected.argmax(axis=1)) > 0.9


@pytest.mark.parametrize(
    ("number_format", "wire"), [("fp32", "f32"), ("bf16", "f32"), ("bf16", "bf16")]
)
def test_a_cut_between_layers_changes_no_bit(
    number_format: str, wire: str, make_chain: MakeChain
) -> None:
    options = dict(number_format=number_format, wire=wire)
    unsplit, split = (
        make_chain("qwen2", "cuda", num_stages=stages, **options).logits(TOKENS[:6], chunk=4)
        for stages in (1, 2)
    )
    np.testing.assert_array_equal(split, unsplit)


def test_tokens_of_several_sequences_equal_those_of_the_cpu(make_chain: MakeChain) -> None:
    prompts = [TOKENS[:3], TOKENS[3:5], TOKENS[5:10]]
    drawn = SamplingParameters(max_tokens=2, temperature=1.3, top_p=0.9, top_k=20, seed=2**63 + 5)
    penalised = SamplingParameters(max_tokens=2, temperature=0.9, presence_penalty=1.5, seed=1)
    for last in (drawn, penalised):
        sampling = [GREEDY, drawn, last]
        expected, actual = (
            make_chain("qwen2", on).generate(prompts, sampling, chunk=4) for on in ("cpu", "cuda")
        )
        assert actual == expected


def test_log_probabilities_equal_those_of_the_cpu(make_chain: MakeChain) -> None:
    asking = SamplingParameters(max_tokens=1, temperature=0.0, logprobs=2)
    found = []
    for on in ("cpu", "cuda"):
        chain = make_chain("qwen2", on)
        chain.start(0, asking)
        sampled = chain.engines[0].step(chain._micro_batch([Run(0, TOKENS[:4])]), None).sampled
        chain.end(0)
        assert sampled is not None
        assert sampled.logprobs[0] is not None
        found.append(sampled.logprobs[0])
    assert found[0].top_token_ids == found[1].top_token_ids
    np.testing.assert_allclose(found[0].top_logprobs, found[1].top_logprobs, atol=1e-4)


def test_a_row_is_the_same_to_the_bit_among_others_of_the_same_padded_number(
    make_chain: MakeChain,
) -> None:
    chain = make_chain("qwen2", "cuda")
    expected = logits_beside(chain, companions=[])
    for companions in ([TOKENS[:1]], [TOKENS[3:4], TOKENS[7:8]]):
        np.testing.assert_array_equal(logits_beside(chain, companions=companions), expected)


def logits_beside(chain: Chain, *, companions: list[list[int]]) -> npt.NDArray[np.float32]:
    """The last logits of five tokens, among the first tokens of other sequences; eight rows."""
    chain.start(1, GREEDY)
    for slot in range(len(companions)):
        chain.start(2 + slot, GREEDY)
    runs = [Run(2 + slot, tokens) for slot, tokens in enumerate(companions)]
    batch = chain._micro_batch([*runs, Run(1, TOKENS[:5])])
    last = chain.engines[0].logits(batch, None)[-1].copy()
    for slot in range(1, 2 + len(companions)):
        chain.end(slot)
    return last


def test_activations_of_another_shape_or_type_are_refused(make_chain: MakeChain) -> None:
    chain = make_chain("qwen2", "cuda", num_stages=2)
    chain.start(0, GREEDY)
    batch = chain._micro_batch([Run(0, TOKENS[:2])])
    wrong: list[Any] = [None, np.zeros((2, 23), np.float32), np.zeros((2, 24), np.uint16)]
    for hidden in wrong:
        with pytest.raises(ProtocolViolation, match="activations are"):
            chain.engines[1]._backend.take(hidden, num_rows=batch.num_rows)
    chain.end(0)


def test_a_stage_that_does_not_fit_into_the_memory_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hugging_face(tmp_path / "model", MODELS["qwen2"]))
    device = make_device()

    class FullDevice(type(device)):  # type: ignore[misc]
        def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Exhausted, match="12 KV blocks"):
        Engine(
            checkpoint,
            load_config(checkpoint),
            StageSlice(first_layer=0, end_layer=2, num_layers=2),
            EngineSettings("bf16", num_kv_blocks=12),
            make_backend=functools.partial(CudaBackend, device=FullDevice()),
        )
