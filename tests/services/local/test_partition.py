"""What is planned for a mesh's memory is what its engines take."""

from __future__ import annotations

import pytest

from core.engine.engine import EngineSettings, kv_bytes_per_block
from core.pipeline.plan import StageSlice
from services.local.partition import model_costs
from tests.services.local.test_planning import SMOLLM2


@pytest.mark.parametrize("number_format", ["fp32", "bf16", "int8", "int4"])
def test_a_kv_block_takes_what_is_planned_for_it(number_format: str) -> None:
    costs = model_costs(SMOLLM2, number_format=number_format)
    settings = EngineSettings(number_format=number_format, num_kv_blocks=1)
    whole = StageSlice(first_layer=0, end_layer=30, num_layers=30)
    assert kv_bytes_per_block(SMOLLM2, whole, settings) == sum(costs.kv_block_bytes)
