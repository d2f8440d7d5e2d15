from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from core.errors import CorruptWeights
from core.weights.dequantise import dequantise


def _library_decodes(block_type: GGMLQuantizationType) -> bool:
    _, num_bytes = GGML_QUANT_SIZES[block_type]
    try:
        gguf.dequantize(np.zeros((1, num_bytes), np.uint8), block_type)
    except NotImplementedError:
        return False
    return True


DECODABLE = [kind for kind in GGML_QUANT_SIZES if _library_decodes(kind)]
QUANTISABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "TQ1_0", "TQ2_0", "MXFP4"]


def test_the_library_still_decodes_what_catalogue_files_need() -> None:
    names = {kind.name for kind in DECODABLE}
    assert len(names) >= 26
    assert names >= {"F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q5_0", "Q6_K", "IQ2_XXS"}


@pytest.mark.parametrize("block_type", DECODABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("num_rows", [1, 3, 700])
def test_random_bytes_decode_as_the_library_decodes_them(
    block_type: GGMLQuantizationType, num_rows: int
) -> None:
    num_values, num_bytes = GGML_QUANT_SIZES[block_type]
    num_blocks = max(1, 768 // num_values)
    random = np.random.default_rng(num_rows)
    raw = random.integers(0, 256, (num_rows, num_blocks * num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales include infinities and NaN
        expected = gguf.dequantize(raw, block_type)
    shape = (num_rows, num_blocks * num_values)
    found = dequantise(raw.ravel(), block_type=block_type, shape=shape)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.flags.owndata or found.base is not raw
    assert np.array_equal(found.view(np.uint32), expected.reshape(shape).view(np.uint32))


@pytest.mark.parametrize("name", QUANTISABLE)
def test_quantised_values_come_back_close(name: str) -> None:
    block_type = GGMLQuantizationType[name]
    values = np.random.default_rng(5).standard_normal((4, 512)).astype(np.float32)
    raw = gguf.quantize(values, block_type).view(np.uint8).ravel()
    found = dequantise(raw, block_type=block_type, shape=values.shape)
    similarity = (found * values).sum() / np.sqrt((found**2).sum() * (values**2).sum())
    assert similarity > (0.7 if name.startswith("TQ") else 0.99)


def test_shapes_of_one_to_four_dimensions_are_kept() -> None:
    values = np.random.default_rng(6).standard_normal((2, 3, 2, 64)).astype(np.float32)
    raw = gguf.quantize(values, GGMLQuantizationType.Q8_0).ravel()
    found = dequantise(raw, block_type=GGMLQuantizationType.Q8_0, shape=values.shape)
    assert found.shape == values.shape
    flat = dequantise(raw, block_type=GGMLQuantizationType.Q8_0, shape=(values.size,))
    assert np.array_equal(flat, found.ravel())


def test_types_that_nobody_decodes_are_refused() -> None:
    with pytest.raises(CorruptWeights, match="Q8_1"):
        dequantise(np.zeros(40, np.uint8), block_type=GGMLQuantizationType.Q8_1, shape=(32,))
