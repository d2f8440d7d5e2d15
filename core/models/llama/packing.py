"""Packs the weights of a stage as `core.models.llama.model` reads them.

Letters: see there. Sizes are rounded up to whole panels, heads to whole vectors; what is
added is zero and stays zero through the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import GROUP, LANES, PANEL_COLUMNS, Arithmetic
from core.kernels.attention.cpu import HeadSizes
from core.kernels.linear.cpu import pack_panels
from core.kernels.memory import aligned_zeros
from core.kernels.rotary.reference import rotary_frequencies
from core.models.llama.config import LlamaConfig
from core.models.llama.model import FloatArray, StageSizes, WordArray
from core.models.llama.weight_names import LayerWeights

# Rows of the embedding and of the head that are float32 at a time, whole panels.
VOCABULARY_PART = 64 * PANEL_COLUMNS
NO_WINDOW = 1 << 40  # more positions than any sequence has


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class StageLayout:
    """Padded sizes of a model's layers under one arithmetic, and where the parts of a layer lie."""

    config: LlamaConfig
    arithmetic: Arithmetic

    @property
    def head_width(self) -> int:
        return round_up(self.config.head_dim, LANES)

    @property
    def hidden(self) -> int:
        return round_up(self.config.hidden_size, PANEL_COLUMNS)

    @property
    def intermediate(self) -> int:
        return round_up(self.config.intermediate_size, PANEL_COLUMNS)

    @property
    def attention(self) -> int:
        return round_up(self.config.num_heads * self.head_width, PANEL_COLUMNS)

    @property
    def qkv(self) -> int:
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        return round_up(heads * self.head_width, PANEL_COLUMNS)

    @property
    def vocabulary(self) -> int:
        return round_up(self.config.vocab_size, PANEL_COLUMNS)

    def matrix_words(self, num_inputs: int, num_columns: int) -> int:
        """Words of a packed matrix."""
        num_groups = num_inputs // GROUP * (num_columns // PANEL_COLUMNS)
        return num_groups * self.arithmetic.weight_group_bytes // 4

    def input_words(self, num_elements: int) -> int:
        """Words of a row of inputs of a product with weights."""
        return num_elements // GROUP * self.arithmetic.input_group_bytes // 4

    def attention_input_words(self, num_elements: int) -> int:
        """Words of queries, of attention's weights, or of its results."""
        return num_elements * self.arithmetic.unquantised.input_bytes // 4

    @property
    def layer_words(self) -> int:
        """Words of all packed matrices of a layer."""
        return (
            self.matrix_words(self.hidden, self.qkv + 2 * self.intermediate)
            + self.matrix_words(self.attention, self.hidden)
            + self.matrix_words(self.intermediate, self.hidden)
        )

    @property
    def layer_floats(self) -> int:
        """Floats of all norms and biases of a layer."""
        return 4 * self.hidden + 2 * self.head_width + self.qkv + 2 * self.intermediate

    @property
    def block_words(self) -> int:
        """Words of keys and values of one KV head in one block."""
        return 2 * LANES * self.head_width // self.arithmetic.unquantised.elements_per_word

    def stage_sizes(self, num_layers: int, *, rounds_residual: bool) -> StageSizes:
        return StageSizes(
            hidden_size=self.config.hidden_size,
            num_layers=num_layers,
            attention_size=self.attention,
            intermediate_size=self.intermediate,
            qkv_columns=self.qkv,
            norm_eps=self.config.norm_eps,
            rounds_residual=rounds_residual,
        )

    def head_sizes(self) -> HeadSizes:
        return HeadSizes(
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            width=self.head_width,
            norms_heads=self.config.qk_norm,
            norm_eps=self.config.norm_eps,
            scale=np.float32(1.0 / math.sqrt(self.config.head_dim)),
        )


def pack_layer(
    layout: StageLayout, layer: LayerWeights, panels: WordArray, vectors: FloatArray
) -> None:
    """Packs one layer into its row of `panels_L` and of `vectors_L`, both zero before."""
    config = layout.config
    packer = _PanelPacker(layout, panels)
    qkv = [_pad_heads(rows, config) for rows in (layer.q_PH, layer.k_KH, layer.v_KH)]
    packer.add(np.concatenate(qkv), layout.hidden, layout.qkv)
    packer.add(_pad_heads(layer.o_HP.T, config).T, layout.attention, layout.hidden)
    packer.add_pair(layer.gate_FH, layer.up_FH, layout.hidden, layout.intermediate)
    packer.add(layer.down_HF, layout.intermediate, layout.hidden)
    _pack_vectors(layout, layer, vectors)


class _PanelPacker:
    """Fills a flat buffer with one packed matrix after the other."""

    def __init__(self, layout: StageLayout, buffer: WordArray) -> None:
        self._layout = layout
        self._rest = buffer
        self._scratch = np.zeros(
            max(layout.hidden, layout.attention, layout.intermediate), np.float32
        )

    def add(self, weight_NK: FloatArray, num_inputs: int, num_columns: int) -> None:
        """Packs a matrix with panels side by side."""
        target = self._take(num_inputs, num_columns)
        self._pack(weight_NK, num_inputs, target, first=0, step=PANEL_COLUMNS)

    def add_pair(self, a_NK: FloatArray, b_NK: FloatArray, num_inputs: int, size: int) -> None:
        """Packs two matrices with alternating panels."""
        target = self._take(num_inputs, 2 * size)
        self._pack(a_NK, num_inputs, target, first=0, step=2 * PANEL_COLUMNS)
        self._pack(b_NK, num_inputs, target, first=PANEL_COLUMNS, step=2 * PANEL_COLUMNS)

    def _take(self, num_inputs: int, num_columns: int) -> WordArray:
        size = self._layout.matrix_words(num_inputs, num_columns)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _pack(
        self, weight_NK: FloatArray, num_inputs: int, target: WordArray, *, first: int, step: int
    ) -> None:
        pack_panels(
            self._layout.arithmetic,
            _for_kernel(weight_NK),
            num_inputs,
            target,
            first,
            step,
            self._scratch,
        )


def _for_kernel(array: FloatArray) -> FloatArray:
    """C order, float32, writable: kernels are compiled for this one kind of array."""
    array = np.ascontiguousarray(array, np.float32)
    return array if array.flags.writeable else array.copy()


def _pad_heads(rows: FloatArray, config: LlamaConfig) -> FloatArray:
    """Gives every head, along the first axis, its padded width."""
    width = round_up(config.head_dim, LANES)
    if width == config.head_dim:
        return rows
    heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
    padding = [(0, 0), (0, width - config.head_dim)] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(heads, padding).reshape(-1, *rows.shape[1:])


def _pack_vectors(layout: StageLayout, layer: LayerWeights, vectors: FloatArray) -> None:
    config = layout.config
    qkv_bias = [
        _pad_heads(bias, config)
        for bias in (layer.q_bias_P, layer.k_bias_K, layer.v_bias_K)
        if bias is not None
    ]
    parts: list[tuple[FloatArray | None, int]] = [
        (layer.attention_norm_H, layout.hidden),
        (layer.mlp_norm_H, layout.hidden),
        (layer.q_norm_D, layout.head_width),
        (layer.k_norm_D, layout.head_width),
        (np.concatenate(qkv_bias) if qkv_bias else None, layout.qkv),
        (layer.o_bias_H, layout.hidden),
        (_alternate(layer.gate_bias_F, layer.up_bias_F, layout), 2 * layout.intermediate),
        (layer.down_bias_H, layout.hidden),
    ]
    start = 0
    for part, size in parts:
        if part is not None:
            vectors[start : start + len(part)] = part
        start += size


def _alternate(
    gate_F: FloatArray | None, up_F: FloatArray | None, layout: StageLayout
) -> FloatArray | None:
    """Biases of gate and up in the order of their panels."""
    if gate_F is None and up_F is None:
        return None
    both = np.zeros((2, layout.intermediate), np.float32)
    for row, bias in zip(both, (gate_F, up_F), strict=True):
        if bias is not None:
            row[: len(bias)] = bias
    panels = both.reshape(2, -1, PANEL_COLUMNS)
    return panels.transpose(1, 0, 2).reshape(-1)


def pack_head(layout: StageLayout, parts_VH: Iterable[FloatArray]) -> WordArray:
    """Packs the head from parts of VOCABULARY_PART rows; the last may have fewer."""
    panels = aligned_zeros((layout.matrix_words(layout.hidden, layout.vocabulary),), np.uint32)
    packer = _PanelPacker(layout, panels)
    for part_VH in parts_VH:
        packer.add(part_VH, layout.hidden, round_up(len(part_VH), PANEL_COLUMNS))
    return panels


def head_bias(layout: StageLayout) -> FloatArray:
    """Zero, but minus infinity for columns beyond the vocabulary."""
    bias_V = aligned_zeros((layout.vocabulary,), np.float32)
    bias_V[layout.config.vocab_size :] = -np.inf
    return bias_V


def pack_final_norm(layout: StageLayout, final_norm_H: FloatArray) -> FloatArray:
    """The final norm, padded."""
    final_norm_G = aligned_zeros((layout.hidden,), np.float32)
    final_norm_G[: len(final_norm_H)] = final_norm_H
    return final_norm_G


def element_type(arithmetic: Arithmetic) -> npt.DTypeLike:
    """numpy's type for elements on the wire and in the embedding."""
    return np.float32 if arithmetic.number_format == "fp32" else np.uint16


def to_elements(arithmetic: Arithmetic, floats: FloatArray) -> npt.NDArray[Any]:
    """Rounds finite float32 to fp32, or else to bf16: bit patterns, to nearest even."""
    if arithmetic.number_format == "fp32":
        return floats
    bits = floats.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def pack_embedding(layout: StageLayout, parts_VH: Iterable[FloatArray]) -> npt.NDArray[Any]:
    """The embedding in the number format (int8: in bf16), rows padded; from parts in order."""
    shape = (layout.config.vocab_size, layout.hidden)
    packed_VG = aligned_zeros(shape, element_type(layout.arithmetic))
    first = 0
    for part_VH in parts_VH:
        end = first + len(part_VH)
        packed_VG[first:end, : part_VH.shape[1]] = to_elements(layout.arithmetic, part_VH)
        first = end
    return packed_VG


@dataclass(frozen=True)
class RotaryAngles:
    """Cosines and sines [positions, head_dim / 2]."""

    cos: FloatArray
    sin: FloatArray


def rotary_angles(config: LlamaConfig, num_positions: int) -> RotaryAngles:
    """Tables for every position.

    Angles are products of float32 numbers, since the models were trained with those: at
    position 1,000 the product differs from the exact one by up to 3e-5 radians.
    """
    scaling = config.rope_scaling
    frequencies = rotary_frequencies(
        head_dim=config.head_dim, theta=config.rope_theta, scaling=scaling
    ).astype(np.float32)
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies
    magnitude = 1.0
    if scaling is not None and scaling.kind == "yarn" and scaling.factor > 1.0:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0  # YaRN's attention temperature
    wide = angles.astype(np.float64)
    return RotaryAngles(
        (np.cos(wide) * magnitude).astype(np.float32), (np.sin(wide) * magnitude).astype(np.float32)
    )


def layer_windows(config: LlamaConfig, first_layer: int, end_layer: int) -> npt.NDArray[np.int64]:
    """Positions that each layer's rows see, their own included."""
    windows = config.windows or (None,) * config.num_layers
    return np.array(
        [NO_WINDOW if window is None else window for window in windows[first_layer:end_layer]],
        np.int64,
    )
