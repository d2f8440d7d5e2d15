"""Weights of 4 bits as the file holds them, against the dequantised ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from core.errors import CorruptWeights
from core.weights.dequantise import Bytes, block_layout, dequantise
from core.weights.gguf import GgufCheckpoint
from core.weights.nibbles import GROUP_SIZE, NIBBLE_TYPES, Nibbles, decode_nibbles
from tests.support.models import TinyModel, write_gguf

each_type = pytest.mark.parametrize("block_type", NIBBLE_TYPES, ids=lambda kind: kind.name)


def random_blocks(block_type: GGMLQuantizationType, num_rows: int, num_blocks: int) -> Bytes:
    """Random bytes, with scales of a size that weights have."""
    _, num_bytes = block_layout(block_type)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (num_rows * num_blocks, num_bytes), dtype=np.uint8)
    num_scales = 1 if block_type == GGMLQuantizationType.Q4_0 else 2
    scales = random.uniform(0.001, 0.01, (len(blocks), num_scales)).astype("<f2")
    blocks[:, : 2 * num_scales] = scales.view(np.uint8)
    return blocks.ravel()


def widened(nibbles: Nibbles) -> np.ndarray:
    scales, minima = (
        np.repeat(part.astype(np.float32), GROUP_SIZE, axis=1)
        for part in (nibbles.scales_NG, nibbles.minima_NG)
    )
    return scales * nibbles.integers_NK + minima


@each_type
def test_scale_times_integer_plus_minimum_is_the_weight(block_type: GGMLQuantizationType) -> None:
    num_values, _ = block_layout(block_type)
    raw, shape = random_blocks(block_type, 5, 3), (5, 3 * num_values)
    nibbles = decode_nibbles(raw, block_type=block_type, shape=shape)
    assert nibbles.integers_NK.max() == 15
    # Scales of Q4_K are products of 17 bits, of which float16 keeps 11.
    tolerance = 2**-10 if block_type == GGMLQuantizationType.Q4_K else 1e-6
    expected = dequantise(raw, block_type=block_type, shape=shape)
    np.testing.assert_allclose(
        widened(nibbles), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def test_rows_of_a_file_are_read_alone(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q4_1
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", TinyModel(), block_type=kind))
    name = "blk.1.ffn_up.weight"
    assert checkpoint.has_nibbles(name)
    assert not checkpoint.has_nibbles("blk.1.ffn_norm.weight")
    part = checkpoint.read_nibbles(name, first=5, count=7)
    assert checkpoint.bytes_read == 7 * 2 * 20
    np.testing.assert_allclose(widened(part), checkpoint.read(name)[5:12], rtol=1e-6, atol=1e-7)
    checkpoint.close()


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "m.gguf", TinyModel(), block_type=kind)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    damaged = bytearray(path.read_bytes())
    damaged[tensor.data_offset : tensor.data_offset + 2] = np.array([np.inf], "<f2").tobytes()
    path.write_bytes(damaged)
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(CorruptWeights, match="NaN or infinite"):
        checkpoint.read_nibbles("blk.0.ffn_up.weight", first=0, count=96)
    checkpoint.close()
