"""The rotary reference against transformers and against what rotation means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from core.kernels.rotary import reference
from core.models.llama.config import RopeScaling


def transformers_frequencies(parameters: dict[str, Any], head_dim: int) -> tuple[Any, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeScaling(
                kind="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_context_length=2048,
            ),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
        ),
        (
            RopeScaling(kind="yarn", factor=4.0, original_context_length=2048),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        ),
    ],
    ids=["linear", "llama3", "yarn"],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_scaled_frequencies_equal_those_of_transformers(
    scaling: RopeScaling, parameters: dict[str, Any], theta: float
) -> None:
    expected_F, magnitude = transformers_frequencies(parameters | {"rope_theta": theta}, 64)
    frequencies_F = reference.rotary_frequencies(head_dim=64, theta=theta, scaling=scaling)
    np.testing.assert_allclose(frequencies_F, expected_F.numpy(), rtol=2e-6)
    tables = reference.rotary_tables(head_dim=64, theta=theta, scaling=scaling, num_positions=1)
    np.testing.assert_allclose(tables.cos_LF[0], magnitude, rtol=1e-6)


def test_explicit_factors_divide_each_frequency() -> None:
    factors = (1.0, 2.0, 8.0, 8.0)
    scaling = RopeScaling(kind="llama3", factor=8.0, factors=factors)
    plain_F = reference.rotary_frequencies(head_dim=8, theta=10000.0, scaling=None)
    scaled_F = reference.rotary_frequencies(head_dim=8, theta=10000.0, scaling=scaling)
    np.testing.assert_allclose(scaled_F, plain_F / factors)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="longrope"):
        reference.rotary_frequencies(
            head_dim=8, theta=10000.0, scaling=RopeScaling(kind="longrope", factor=2.0)
        )


def test_scores_depend_on_the_distance_of_positions_only() -> None:
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((1, 1, 16)).astype(np.float32) for _ in range(2))
    tables = reference.rotary_tables(head_dim=16, theta=10000.0, scaling=None, num_positions=64)

    def score(q_position: int, k_position: int) -> float:
        rotated_q = reference.rotate(q, np.array([q_position], np.int32), tables)
        rotated_k = reference.rotate(k, np.array([k_position], np.int32), tables)
        return float((rotated_q * rotated_k).sum())

    assert score(40, 33) == pytest.approx(score(12, 5), abs=1e-5)
    assert score(40, 33) != pytest.approx(score(12, 6), abs=1e-2)


def test_keys_and_values_go_to_their_blocks_and_nowhere_else() -> None:
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((2, 1, 4)).astype(np.float32) for _ in range(3))
    keys, values = (np.full((3, 4, 1, 4), np.nan, np.float32) for _ in range(2))
    tables = reference.rotary_tables(head_dim=4, theta=100.0, scaling=None, num_positions=8)
    positions = np.array([0, 7], np.int32)
    reference.rotate_and_write(
        q,
        k,
        v,
        positions_T=positions,
        block_ids_T=np.array([2, 0], np.int32),
        tables=tables,
        keys_BPKD=keys,
        values_BPKD=values,
    )
    np.testing.assert_array_equal(keys[2, 0], k[0])  # position 0 is not rotated
    np.testing.assert_array_equal(values[0, 3], v[1])
    assert np.isfinite(keys).any(axis=(2, 3)).sum() == 2
    assert np.isfinite(values).any(axis=(2, 3)).sum() == 2
