"""Packs the weights of a stage as `core.models.llama.model` reads them.

Letters: see there. Sizes are rounded up to whole panels, heads to whole vectors; what is
added is zero and stays zero through the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import GROUP, LANES, PANEL_COLUMNS, Arithmetic
from core.kernels.attention.cpu import HeadSizes
from core.kernels.linear.cpu import pack_panels
from core.kernels.linear.nibble_panels import pack_nibble_panels
from core.kernels.memory import aligned_zeros
from core.kernels.rotary.reference import rotary_frequencies
from core.models.llama.config import LlamaConfig
from core.models.llama.model import OUTPUT, QKV, FloatArray, StageSizes, WordArray
from core.models.llama.weight_names import LayerReader, Rows
from core.weights.nibbles import Nibbles

# Rows of the embedding and of the head that are float32 at a time, whole panels.
VOCABULARY_PART = 64 * PANEL_COLUMNS
# Parts of the matrices of a layer, by their names in LayerWeights.
_FIELDS = (("q_PH", "k_KH", "v_KH"), ("o_HP",), ("gate_FH", "up_FH"), ("down_HF",))
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

    def matrix_words(self, num_inputs: int, num_columns: int, *, nibbles: bool) -> int:
        """Words of a packed matrix, of 4 bits or as the arithmetic has others."""
        arithmetic = self.arithmetic if nibbles else self.arithmetic.of_bytes
        return num_columns // PANEL_COLUMNS * arithmetic.panel_bytes(num_inputs) // 4

    def input_words(self, num_elements: int) -> int:
        """Words of a row of inputs of a product with weights."""
        kinds = (self.arithmetic, self.arithmetic.of_bytes)
        return num_elements // GROUP * max(kind.input_group_bytes for kind in kinds) // 4

    def attention_input_words(self, num_elements: int) -> int:
        """Words of a row of attention's results."""
        return num_elements * self.arithmetic.unquantised.input_bytes // 4

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and columns of a layer's matrices, in their order."""
        return (
            (self.hidden, self.qkv),
            (self.attention, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        )

    def nibbles_of_layer(self, reader: LayerReader) -> list[bool]:
        """Which of a layer's matrices are packed as weights of 4 bits: those whose parts all have
        them. Padded heads would tear the groups of inputs apart."""
        return [
            self.arithmetic.has_nibbles
            and reader.has_nibbles(fields)
            and (matrix != OUTPUT or self.head_width == self.config.head_dim)
            for matrix, fields in enumerate(_FIELDS)
        ]

    @property
    def layer_floats(self) -> int:
        """Floats of all norms and biases of a layer."""
        return 4 * self.hidden + 2 * self.head_width + self.qkv + 2 * self.intermediate

    @property
    def block_words(self) -> int:
        """Words of keys and values of one KV head in one block."""
        return 2 * self.arithmetic.of_cache.cache_bytes(self.head_width) // 4

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


def place_matrices(
    layout: StageLayout, nibbles_LM: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], int]:
    """Where the matrices of all layers begin, in bytes, [L, 4]; and the words of all together."""
    words_LM = np.array(
        [
            [
                layout.matrix_words(*sizes, nibbles=bool(nibbles))
                for sizes, nibbles in zip(layout.matrices, nibbles_M, strict=True)
            ]
            for nibbles_M in nibbles_LM
        ],
        np.int64,
    ).reshape(nibbles_LM.shape)
    ends = np.cumsum(words_LM)
    starts_LM = (ends - words_LM.ravel()).reshape(nibbles_LM.shape)
    return starts_LM * 4, int(ends[-1]) if ends.size else 0


def pack_layer(
    layout: StageLayout,
    reader: LayerReader,
    nibbles_M: Sequence[bool],
    panels: WordArray,
    vectors: FloatArray,
) -> None:
    """Packs one layer: its matrices one after the other from the start of `panels` on, and its row
    of `vectors_L`. Both are zero before."""
    packer = _PanelPacker(layout, panels)
    for matrix, (sizes, nibbles) in enumerate(zip(layout.matrices, nibbles_M, strict=True)):
        if nibbles:
            packer.add_nibbles(_read_nibbles(layout, reader, matrix), *sizes)
        else:
            packer.add(_read_floats(layout, reader, matrix), *sizes)
    _pack_vectors(layout, reader, vectors)


def _read_floats(layout: StageLayout, reader: LayerReader, matrix: int) -> list[FloatArray]:
    """The parts of a matrix whose panels alternate."""
    parts = [reader.read(field) for field in _FIELDS[matrix]]
    if matrix == QKV:
        return [np.concatenate([_pad_heads(rows, layout.config) for rows in parts])]
    if matrix == OUTPUT:
        return [_pad_heads(parts[0].T, layout.config).T]
    return parts


def _read_nibbles(layout: StageLayout, reader: LayerReader, matrix: int) -> list[Nibbles]:
    """As `_read_floats`."""
    parts = [reader.read_nibbles(field) for field in _FIELDS[matrix]]
    if matrix != QKV:
        return parts
    padded = [[_pad_heads(rows, layout.config) for rows in part] for part in parts]
    return [Nibbles(*(np.concatenate(rows) for rows in zip(*padded, strict=True)))]


class _PanelPacker:
    """Fills a flat buffer with one packed matrix after the other."""

    def __init__(self, layout: StageLayout, buffer: WordArray) -> None:
        self._layout = layout
        self._rest = buffer
        self._scratch = np.zeros(
            max(layout.hidden, layout.attention, layout.intermediate), np.float32
        )

    def add(self, parts_NK: Sequence[FloatArray], num_inputs: int, num_columns: int) -> None:
        """Packs a matrix of parts whose panels alternate."""
        target = self._take(num_inputs, num_columns, nibbles=False)
        for number, part_NK in enumerate(parts_NK):
            pack_panels(
                self._layout.arithmetic.of_bytes,
                _for_kernel(part_NK),
                num_inputs,
                target,
                number * PANEL_COLUMNS,
                len(parts_NK) * PANEL_COLUMNS,
                self._scratch,
            )

    def add_nibbles(self, parts: Sequence[Nibbles], num_inputs: int, num_columns: int) -> None:
        """As `add`."""
        target = self._take(num_inputs, num_columns, nibbles=True)
        for number, part in enumerate(parts):
            pack_nibble_panels(*part, num_inputs, target, first=number, step=len(parts))

    def _take(self, num_inputs: int, num_columns: int, *, nibbles: bool) -> WordArray:
        size = self._layout.matrix_words(num_inputs, num_columns, nibbles=nibbles)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def _for_kernel(array: FloatArray) -> FloatArray:
    """C order, float32, writable: kernels are compiled for this one kind of array."""
    array = np.ascontiguousarray(array, np.float32)
    return array if array.flags.writeable else array.copy()


def _pad_heads(rows: Rows, config: LlamaConfig) -> Rows:
    """Gives every head, along the first axis, its padded width."""
    width = round_up(config.head_dim, LANES)
    if width == config.head_dim:
        return rows
    heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
    padding = [(0, 0), (0, width - config.head_dim)] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(heads, padding).reshape(-1, *rows.shape[1:])


def _pack_vectors(layout: StageLayout, reader: LayerReader, vectors: FloatArray) -> None:
    config = layout.config
    found = [reader.find(field) for field in ("q_bias_P", "k_bias_K", "v_bias_K")]
    qkv_bias = [_pad_heads(bias, config) for bias in found if bias is not None]
    parts: list[tuple[FloatArray | None, int]] = [
        (reader.find("attention_norm_H"), layout.hidden),
        (reader.find("mlp_norm_H"), layout.hidden),
        (reader.find("q_norm_D"), layout.head_width),
        (reader.find("k_norm_D"), layout.head_width),
        (np.concatenate(qkv_bias) if qkv_bias else None, layout.qkv),
        (reader.find("o_bias_H"), layout.hidden),
        (
            _alternate(reader.find("gate_bias_F"), reader.find("up_bias_F"), layout),
            2 * layout.intermediate,
        ),
        (reader.find("down_bias_H"), layout.hidden),
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
    panels = _head_panels(layout, nibbles=False)
    packer = _PanelPacker(layout, panels)
    for part_VH in parts_VH:
        packer.add([part_VH], layout.hidden, round_up(len(part_VH), PANEL_COLUMNS))
    return panels


def pack_head_nibbles(layout: StageLayout, head: Nibbles) -> WordArray:
    """Packs a head of 4 bits."""
    panels = _head_panels(layout, nibbles=True)
    _PanelPacker(layout, panels).add_nibbles([head], layout.hidden, layout.vocabulary)
    return panels


def _head_panels(layout: StageLayout, *, nibbles: bool) -> WordArray:
    num_words = layout.matrix_words(layout.hidden, layout.vocabulary, nibbles=nibbles)
    return aligned_zeros((num_words,), np.uint32)


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
    """The embedding, of integer formats in bf16, rows padded; from parts in order."""
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
