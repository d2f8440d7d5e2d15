"""How blocks of CUDA attention share heads; needs no device."""

from __future__ import annotations

import pytest

from core.kernels.attention import cuda_shape


@pytest.mark.parametrize("group_size", [1, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_a_group_is_shared_among_as_few_blocks_as_registers_allow(
    head_dim: int, group_size: int, number_format: str
) -> None:
    per_word = {"fp32": 2, "bf16": 4}[number_format]
    shape = cuda_shape.block_shape(head_dim // per_word, group_size, number_format)
    assert 1 <= shape.heads <= group_size
    assert shape.heads * head_dim <= cuda_shape.MOST_QUERIES * shape.lanes
    assert shape.lanes * shape.heads <= cuda_shape.MOST_LANE_HEADS
    assert shape.lanes <= shape.columns <= cuda_shape.WARP
