"""A stage of a Llama-architecture decoder as one compiled call per micro-batch.

All sizes are run-time values; only the arithmetic is compiled in. Everything that the call
touches is allocated beforehand and handed in as named tuples of arrays.

Letters: L layers of the stage, T rows, S sampled rows, V vocabulary, F intermediate size, C
columns of q, k and v together, P columns of all query heads, G the hidden size. All of F, C, P, G
and V are rounded up to multiples of 64 (a weight panel); what is beyond the model's own
size is zero.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import GROUP, PANEL_COLUMNS, input_bytes, is_integer, unquantised
from core.kernels.attention.cpu import AttentionWorkspace, HeadSizes, RowTable, attend
from core.kernels.compile import kernel
from core.kernels.mixed import (
    greedy_tokens,
    group_bytes,
    multiply_panels,
    norm_rows,
    panel_bytes,
    quantise_rows,
    silu_multiply_panel,
)
from core.kernels.packing.cpu import gather_rows, gather_widened_rows
from core.kernels.rotary.cpu import rotate_and_write
from core.kernels.tiles import PANEL_ROW_BYTES
from core.kernels.vectors import address

# The matrices of a layer, in their order: q/k/v, output, gate/up (panels alternate), down.
QKV, OUTPUT, GATE_UP, DOWN = range(4)

FloatArray = npt.NDArray[np.float32]
WordArray = npt.NDArray[np.uint32]
# Elements in the number format: float32 for fp32, else uint16 bit patterns of bf16.
ElementArray = npt.NDArray[Any]


class StageSizes(NamedTuple):
    """Sizes of a stage's layers, in elements."""

    hidden_size: int
    num_layers: int
    attention_size: int  # P: inputs of the output projection
    intermediate_size: int  # F
    qkv_columns: int  # C
    norm_eps: float
    # Whether the residual stream is rounded after every layer to what the wire carries.
    rounds_residual: bool


class StageWeights(NamedTuple):
    """Weights of all layers of a stage, packed; see `core.models.llama.packing`."""

    panels: WordArray  # of all layers, flat
    offsets_LM: npt.NDArray[np.int64]  # [L, 4]: where each matrix begins, in bytes
    nibbles_LM: npt.NDArray[np.bool_]  # [L, 4]: whether it has 4 bits, see `core.kernels.mixed`
    # [L, floats]: attention norm, MLP norm, q norm, k norm, then biases as the panels
    vectors_L: FloatArray
    windows_L: npt.NDArray[np.int64]  # positions that a layer's rows see
    embedding_VG: ElementArray  # first stage only, else [0, G]
    head_panels: WordArray  # last stage only, else empty
    head_nibbles: bool
    head_bias_V: FloatArray  # zero; minus infinity beyond the vocabulary
    final_norm_G: FloatArray
    cos: FloatArray  # [positions, head_dim / 2]
    sin: FloatArray


class StageWorkspace(NamedTuple):
    """Buffers of one micro-batch, reused by the next."""

    hidden_TG: FloatArray  # the residual stream: activations as they come and as they go
    normed_T: WordArray  # normed rows (or, as int8, attended ones), as inputs of a product; flat
    attended_T: WordArray  # outputs of attention, as inputs of a product that is not quantised
    qkv_TC: FloatArray
    gate_up_T: FloatArray  # [T, 128]
    intermediate_T: WordArray  # likewise
    sampled_hidden_SG: FloatArray
    panel_logits_S: FloatArray  # [S, 64]
    head_scratch: WordArray
    wide_panel: FloatArray  # one weight panel, widened


class StageInputs(NamedTuple):
    """One micro-batch. `embeds` and `projects` tell whether the stage is first and last."""

    embeds: bool
    projects: bool
    token_ids_T: npt.NDArray[np.int32]
    greedy_rows_S: npt.NDArray[np.int32]  # rows whose likeliest token is wanted
    num_greedy: int
    logits_rows_S: npt.NDArray[np.int32]  # rows whose logits are wanted
    num_logits: int


class StageOutputs(NamedTuple):
    """What a last stage computes; the others leave their result in the workspace."""

    greedy_tokens_S: npt.NDArray[np.int32]
    logits_SV: FloatArray


@kernel
def row_bytes(arithmetic, nibbles, num_inputs):
    """Bytes of a row of inputs of a product."""
    return num_inputs // GROUP * group_bytes(arithmetic, nibbles)


@kernel
def run_attention(arithmetic, sizes, heads, weights, layer, cache, rows, work, attention_work):
    """The attention half of a layer: hidden += output(attention(q, k, v(norm(hidden))))."""
    beside = unquantised(arithmetic)
    padded_hidden, num_rows = work.hidden_TG.shape[1], rows.num_rows
    normed, attended = address(work.normed_T), address(work.attended_T)
    panels, offsets_M = address(weights.panels), weights.offsets_LM[layer]
    nibbles_M, vectors_V = weights.nibbles_LM[layer], weights.vectors_L[layer]
    head_norms = address(vectors_V) + 2 * padded_hidden * 4
    qkv_bias = head_norms + 2 * heads.width * 4
    norm_rows(
        arithmetic, nibbles_M[QKV], work.hidden_TG, num_rows, sizes.hidden_size,
        vectors_V[:padded_hidden], sizes.norm_eps, sizes.rounds_residual, normed,
    )  # fmt: skip
    multiply_panels(
        arithmetic, nibbles_M[QKV], normed, row_bytes(arithmetic, nibbles_M[QKV], padded_hidden),
        num_rows, panels + offsets_M[QKV], padded_hidden, sizes.qkv_columns // PANEL_COLUMNS,
        qkv_bias, address(work.qkv_TC), sizes.qkv_columns * 4, 0, work.wide_panel,
    )  # fmt: skip
    rotate_and_write(
        beside, heads, rows, work.qkv_TC, weights.cos, weights.sin, head_norms, cache,
        address(work.head_scratch),
    )  # fmt: skip
    attend(
        beside, heads, rows, work.qkv_TC, cache, weights.windows_L[layer], attention_work,
        attended, sizes.attention_size * input_bytes(beside),
    )  # fmt: skip
    if is_integer(arithmetic):
        quantise_rows(
            arithmetic, nibbles_M[OUTPUT], attended, num_rows, sizes.attention_size, normed
        )
        attended = normed
    multiply_panels(
        arithmetic, nibbles_M[OUTPUT], attended,
        row_bytes(arithmetic, nibbles_M[OUTPUT], sizes.attention_size), num_rows,
        panels + offsets_M[OUTPUT], sizes.attention_size, padded_hidden // PANEL_COLUMNS,
        qkv_bias + sizes.qkv_columns * 4, address(work.hidden_TG), padded_hidden * 4, 1,
        work.wide_panel,
    )  # fmt: skip


@kernel
def run_mlp(arithmetic, sizes, heads, weights, layer, num_rows, work):
    """The gated half of a layer: hidden += down(SiLU(gate(norm(hidden))) * up(norm(hidden)))."""
    padded_hidden, inner = work.hidden_TG.shape[1], sizes.intermediate_size
    panels, offsets_M = address(weights.panels), weights.offsets_LM[layer]
    nibbles_M, vectors_V = weights.nibbles_LM[layer], weights.vectors_L[layer]
    wide, narrow = nibbles_M[GATE_UP], nibbles_M[DOWN]
    hidden_bytes = row_bytes(arithmetic, wide, padded_hidden)
    inner_bytes = row_bytes(arithmetic, narrow, inner)
    normed = address(work.normed_T)
    biases = address(vectors_V) + 4 * (3 * padded_hidden + 2 * heads.width + sizes.qkv_columns)
    gate_up, intermediate = address(work.gate_up_T), address(work.intermediate_T)
    norm_rows(
        arithmetic, wide, work.hidden_TG, num_rows, sizes.hidden_size,
        vectors_V[padded_hidden : 2 * padded_hidden], sizes.norm_eps, False, normed,
    )  # fmt: skip
    for panel in range(inner // PANEL_COLUMNS):
        multiply_panels(
            arithmetic, wide, normed, hidden_bytes, num_rows,
            panels + offsets_M[GATE_UP] + panel * 2 * panel_bytes(arithmetic, wide, padded_hidden),
            padded_hidden, 2,
            biases + panel * 2 * PANEL_ROW_BYTES, gate_up, 2 * PANEL_ROW_BYTES, 0,
            work.wide_panel,
        )  # fmt: skip
        silu_multiply_panel(
            arithmetic, narrow, gate_up, num_rows,
            intermediate + panel * group_bytes(arithmetic, narrow), inner_bytes,
        )  # fmt: skip
    multiply_panels(
        arithmetic, narrow, intermediate, inner_bytes, num_rows, panels + offsets_M[DOWN], inner,
        padded_hidden // PANEL_COLUMNS, biases + 2 * inner * 4,
        address(work.hidden_TG), padded_hidden * 4, 1, work.wide_panel,
    )  # fmt: skip


@kernel
def run_head(arithmetic, sizes, weights, inputs, work, outputs):
    """Final norm and head: likeliest tokens of some rows, all logits of others."""
    padded_hidden = work.hidden_TG.shape[1]
    nibbles = weights.head_nibbles
    hidden_bytes = row_bytes(arithmetic, nibbles, padded_hidden)
    num_panels = weights.head_bias_V.shape[0] // PANEL_COLUMNS
    normed, panels = address(work.normed_T), address(weights.head_panels)
    bias = address(weights.head_bias_V)
    if inputs.num_greedy > 0:
        gather_rows(work.hidden_TG, inputs.greedy_rows_S, inputs.num_greedy, work.sampled_hidden_SG)
        norm_rows(
            arithmetic, nibbles, work.sampled_hidden_SG, inputs.num_greedy, sizes.hidden_size,
            weights.final_norm_G, sizes.norm_eps, sizes.rounds_residual, normed,
        )  # fmt: skip
        greedy_tokens(
            arithmetic, nibbles, normed, hidden_bytes, inputs.num_greedy, panels, padded_hidden,
            num_panels, bias, work.panel_logits_S, outputs.greedy_tokens_S,
            work.wide_panel,
        )  # fmt: skip
    if inputs.num_logits > 0:
        gather_rows(work.hidden_TG, inputs.logits_rows_S, inputs.num_logits, work.sampled_hidden_SG)
        norm_rows(
            arithmetic, nibbles, work.sampled_hidden_SG, inputs.num_logits, sizes.hidden_size,
            weights.final_norm_G, sizes.norm_eps, sizes.rounds_residual, normed,
        )  # fmt: skip
        multiply_panels(
            arithmetic, nibbles, normed, hidden_bytes, inputs.num_logits, panels, padded_hidden,
            num_panels, bias, address(outputs.logits_SV), outputs.logits_SV.shape[1] * 4, 0,
            work.wide_panel,
        )  # fmt: skip


@kernel
def run_stage(
    arithmetic, sizes, heads, weights, cache_L, inputs, rows, work, attention_work, outputs
):
    """Computes one micro-batch: activations in, activations or tokens and logits out.

    Arguments are the tuples of this module and of `core.kernels.attention.cpu`. `cache_L` is
    uint32 [L, blocks, KV heads, 2, words]; the rows' keys and values are added to it.
    Activations come and go in `work.hidden_TG`.
    """
    if inputs.embeds:
        gather_widened_rows(
            unquantised(arithmetic), weights.embedding_VG, inputs.token_ids_T, rows.num_rows,
            work.hidden_TG,
        )  # fmt: skip
    for layer in range(sizes.num_layers):
        run_attention(
            arithmetic, sizes, heads, weights, layer, address(cache_L[layer]), rows, work,
            attention_work,
        )  # fmt: skip
        run_mlp(arithmetic, sizes, heads, weights, layer, rows.num_rows, work)
    if inputs.projects:
        run_head(arithmetic, sizes, weights, inputs, work, outputs)


__all__ = [
    "AttentionWorkspace",
    "HeadSizes",
    "RowTable",
    "StageInputs",
    "StageOutputs",
    "StageSizes",
    "StageWeights",
    "StageWorkspace",
    "run_stage",
]
