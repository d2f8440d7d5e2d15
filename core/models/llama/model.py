"""A stage of a Llama-architecture decoder as one compiled call per micro-batch and thread.

All sizes are run-time values; only the arithmetic is compiled in. Everything that the call
touches is allocated beforehand and handed in as named tuples of arrays. Members of a team compute
a micro-batch together (`core.kernels.team`): panels of a product are shared among them, and rows or
KV heads of everything else.

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

from core.kernels.ahead import begin_layer, end_layer
from core.kernels.arithmetic import PANEL_COLUMNS, input_bytes, is_integer, of_cache, unquantised
from core.kernels.attention.cpu import AttentionWorkspace, HeadSizes, RowTable, attend
from core.kernels.compile import kernel
from core.kernels.linear.cpu import PanelScratch, tiles_of_panel
from core.kernels.mixed import (
    greedy_tokens,
    group_bytes,
    multiply_columns,
    panel_bytes,
    quantise_rows,
    silu_multiply_panel,
)
from core.kernels.packing.cpu import gather_rows, gather_widened_rows
from core.kernels.rotary.cpu import rotate_and_write
from core.kernels.shares import list_share, multiply_share, norm_share, row_bytes, share_of_rows
from core.kernels.team import Share, Team, is_called, meet, share
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

    # Of all members:
    hidden_TG: FloatArray  # the residual stream: activations as they come and as they go
    normed_T: WordArray  # normed rows (or, as int8, attended ones), as inputs of a product; flat
    attended_T: WordArray  # outputs of attention, as inputs of a product that is not quantised
    qkv_TC: FloatArray
    intermediate_T: WordArray  # likewise
    sampled_hidden_SG: FloatArray
    best_MS: FloatArray  # [members, S]: what each member found among its panels
    best_tokens_MS: npt.NDArray[np.int32]
    # Of one member:
    gate_up_T: FloatArray  # [T, 128]
    panel_logits_S: FloatArray  # [S, 64]
    head_scratch: WordArray
    scratch: PanelScratch


class StageInputs(NamedTuple):
    """Micro-batches, one after the other. `embeds` and `projects`: whether the stage is first and
    last."""

    embeds: bool
    projects: bool
    counts: npt.NDArray[np.int64]  # see below
    token_ids_T: npt.NDArray[np.int32]
    slots_T: npt.NDArray[np.int32]
    positions_T: npt.NDArray[np.int32]
    greedy_rows_S: npt.NDArray[np.int32]  # rows whose likeliest token is wanted
    logits_rows_S: npt.NDArray[np.int32]  # rows whose logits are wanted


# What `StageInputs.counts` has: numbers, and the sequences' block tables as in `RowTable`.
NUM_COUNTS = 6
NUM_MEMBERS, NUM_ROWS, NUM_GREEDY, NUM_LOGITS, BLOCK_TABLES, TABLE_BYTES = range(NUM_COUNTS)


class StageMember(NamedTuple):
    """Who computes: the leader, member 0, or one whom the leader calls."""

    number: int
    call: int  # file descriptor of a pipe with a byte for each micro-batch; the leader has none
    barrier: npt.NDArray[np.int64]  # of all members, see `core.kernels.team`
    room: npt.NDArray[np.uint8]  # for that byte


class StageOutputs(NamedTuple):
    """What a last stage computes; the others leave their result in the workspace."""

    greedy_tokens_S: npt.NDArray[np.int32]
    logits_SV: FloatArray


@kernel
def attend_share(
    arithmetic, heads, team, rows, weights, layer, head_norms, cache, work, attention_work,
    out, out_stride,
):  # fmt: skip
    """The member's part of attention, from q, k and v as they are multiplied: some rows, or some
    heads where there are fewer rows than members."""
    mine, my_heads = Share(0, rows.num_rows), share(team, heads.num_kv_heads)
    if rows.num_rows >= team.size:
        mine, my_heads = share_of_rows(arithmetic, team, rows), Share(0, heads.num_kv_heads)
    some_rows = RowTable(
        mine.end - mine.first, rows.slots_T[mine.first : mine.end],
        rows.positions_T[mine.first : mine.end], rows.block_tables, rows.table_bytes,
    )  # fmt: skip
    qkv_TC = work.qkv_TC[mine.first : mine.end]
    rotate_and_write(
        arithmetic, heads, my_heads, some_rows, qkv_TC, weights.cos, weights.sin, head_norms, cache,
        address(work.head_scratch),
    )  # fmt: skip
    meet(team)
    attend(
        arithmetic, heads, my_heads, some_rows, qkv_TC, cache, weights.windows_L[layer],
        attention_work, out + mine.first * out_stride, out_stride,
    )  # fmt: skip


@kernel
def fetch_for_layer(arithmetic, team, sizes, num_rows, layer, cache_L, work):
    """From now on products fetch what attention of that layer reads, if there is such a layer."""
    if layer == sizes.num_layers:
        end_layer(work.scratch.ahead)
        return
    padded_hidden = work.hidden_TG.shape[1]
    num_columns = sizes.qkv_columns + 2 * padded_hidden + 2 * sizes.intermediate_size
    num_panels = num_columns // PANEL_COLUMNS // team.size
    begin_layer(
        work.scratch.ahead, address(cache_L[layer]),
        num_panels * tiles_of_panel(arithmetic, num_rows),
        panel_bytes(arithmetic, False, padded_hidden) // PANEL_ROW_BYTES,
    )  # fmt: skip


@kernel
def run_attention(
    arithmetic, team, sizes, heads, weights, layer, cache_L, rows, work, attention_work
):  # fmt: skip
    """The attention half of a layer: hidden += output(attention(q, k, v(norm(hidden))))."""
    beside = unquantised(arithmetic)
    padded_hidden, num_rows = work.hidden_TG.shape[1], rows.num_rows
    normed, attended = address(work.normed_T), address(work.attended_T)
    panels, offsets_M = address(weights.panels), weights.offsets_LM[layer]
    nibbles_M, vectors_V = weights.nibbles_LM[layer], weights.vectors_L[layer]
    head_norms = address(vectors_V) + 2 * padded_hidden * 4
    qkv_bias = head_norms + 2 * heads.width * 4
    norm_share(
        arithmetic, nibbles_M[QKV], team, work.hidden_TG, num_rows, sizes.hidden_size,
        vectors_V[:padded_hidden], sizes.norm_eps, sizes.rounds_residual, normed,
    )  # fmt: skip
    meet(team)
    multiply_share(
        arithmetic, nibbles_M[QKV], team, normed,
        row_bytes(arithmetic, nibbles_M[QKV], padded_hidden), num_rows, panels + offsets_M[QKV],
        padded_hidden, sizes.qkv_columns // PANEL_COLUMNS,
        qkv_bias, address(work.qkv_TC), sizes.qkv_columns * 4, 0, work.scratch,
    )  # fmt: skip
    meet(team)
    attended_bytes = sizes.attention_size * input_bytes(beside)
    attend_share(
        of_cache(arithmetic), heads, team, rows, weights, layer, head_norms,
        address(cache_L[layer]), work, attention_work, attended, attended_bytes,
    )  # fmt: skip
    meet(team)
    fetch_for_layer(arithmetic, team, sizes, num_rows, layer + 1, cache_L, work)
    output_bytes = row_bytes(arithmetic, nibbles_M[OUTPUT], sizes.attention_size)
    if is_integer(arithmetic):
        mine = share(team, num_rows)
        quantise_rows(
            arithmetic, nibbles_M[OUTPUT], attended + mine.first * attended_bytes,
            mine.end - mine.first, sizes.attention_size, normed + mine.first * output_bytes,
        )  # fmt: skip
        attended = normed
        meet(team)
    multiply_share(
        arithmetic, nibbles_M[OUTPUT], team, attended, output_bytes, num_rows,
        panels + offsets_M[OUTPUT], sizes.attention_size, padded_hidden // PANEL_COLUMNS,
        qkv_bias + sizes.qkv_columns * 4, address(work.hidden_TG), padded_hidden * 4, 1,
        work.scratch,
    )  # fmt: skip
    meet(team)


@kernel
def run_mlp(arithmetic, team, sizes, heads, weights, layer, num_rows, work):
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
    norm_share(
        arithmetic, wide, team, work.hidden_TG, num_rows, sizes.hidden_size,
        vectors_V[padded_hidden : 2 * padded_hidden], sizes.norm_eps, False, normed,
    )  # fmt: skip
    meet(team)
    mine = share(team, inner // PANEL_COLUMNS)
    for panel in range(mine.first, mine.end):
        multiply_columns(
            arithmetic, wide, normed, hidden_bytes, num_rows,
            panels + offsets_M[GATE_UP] + panel * 2 * panel_bytes(arithmetic, wide, padded_hidden),
            padded_hidden, 0, 2 * PANEL_COLUMNS,
            biases + panel * 2 * PANEL_ROW_BYTES, gate_up, 2 * PANEL_ROW_BYTES, 0,
            work.scratch,
        )  # fmt: skip
        silu_multiply_panel(
            arithmetic, narrow, gate_up, num_rows,
            intermediate + panel * group_bytes(arithmetic, narrow), inner_bytes,
        )  # fmt: skip
    meet(team)
    multiply_share(
        arithmetic, narrow, team, intermediate, inner_bytes, num_rows, panels + offsets_M[DOWN],
        inner, padded_hidden // PANEL_COLUMNS, biases + 2 * inner * 4,
        address(work.hidden_TG), padded_hidden * 4, 1, work.scratch,
    )  # fmt: skip
    meet(team)


@kernel
def norm_sampled(arithmetic, team, sizes, weights, rows_S, num_sampled, work):
    """Gathers the sampled rows and norms them."""
    mine = share(team, num_sampled)
    gather_rows(
        work.hidden_TG, rows_S[mine.first : mine.end], mine.end - mine.first,
        work.sampled_hidden_SG[mine.first : mine.end],
    )  # fmt: skip
    norm_share(
        arithmetic, weights.head_nibbles, team, work.sampled_hidden_SG, num_sampled,
        sizes.hidden_size, weights.final_norm_G, sizes.norm_eps, sizes.rounds_residual,
        address(work.normed_T),
    )  # fmt: skip
    meet(team)


@kernel
def choose_greedily(team, num_greedy, work, tokens_S):
    """The likeliest token of each row, of those that members found; of equal ones the first."""
    mine = share(team, num_greedy)
    for row in range(mine.first, mine.end):
        best = np.float32(-np.inf)
        tokens_S[row] = 0
        for member in range(team.size):
            if work.best_MS[member, row] > best:
                best = work.best_MS[member, row]
                tokens_S[row] = work.best_tokens_MS[member, row]


@kernel
def run_head(arithmetic, team, sizes, weights, inputs, work, outputs):
    """Final norm and head: likeliest tokens of some rows, all logits of others."""
    padded_hidden = work.hidden_TG.shape[1]
    num_greedy, num_logits = inputs.counts[NUM_GREEDY], inputs.counts[NUM_LOGITS]
    nibbles = weights.head_nibbles
    hidden_bytes = row_bytes(arithmetic, nibbles, padded_hidden)
    num_panels = weights.head_bias_V.shape[0] // PANEL_COLUMNS
    normed, panels = address(work.normed_T), address(weights.head_panels)
    bias = address(weights.head_bias_V)
    if num_greedy > 0:
        norm_sampled(arithmetic, team, sizes, weights, inputs.greedy_rows_S, num_greedy, work)
        mine = share(team, num_panels)
        tokens_S = work.best_tokens_MS[team.member]
        greedy_tokens(
            arithmetic, nibbles, normed, hidden_bytes, num_greedy,
            panels + mine.first * panel_bytes(arithmetic, nibbles, padded_hidden), padded_hidden,
            mine.end - mine.first, bias + mine.first * PANEL_ROW_BYTES, work.panel_logits_S,
            tokens_S, work.best_MS[team.member], work.scratch,
        )  # fmt: skip
        for row in range(num_greedy):
            tokens_S[row] += mine.first * PANEL_COLUMNS
        meet(team)
        choose_greedily(team, num_greedy, work, outputs.greedy_tokens_S)
    if num_logits > 0:
        norm_sampled(arithmetic, team, sizes, weights, inputs.logits_rows_S, num_logits, work)
        multiply_share(
            arithmetic, nibbles, team, normed, hidden_bytes, num_logits, panels, padded_hidden,
            num_panels, bias, address(outputs.logits_SV), outputs.logits_SV.shape[1] * 4, 0,
            work.scratch,
        )  # fmt: skip
    meet(team)


@kernel
def run_layers(
    arithmetic, team, sizes, heads, weights, cache_L, inputs, rows, work, attention_work
):  # fmt: skip
    """Everything but the head; activations are in `work.hidden_TG` when members have met."""
    if inputs.embeds:
        mine = share(team, rows.num_rows)
        gather_widened_rows(
            unquantised(arithmetic), weights.embedding_VG, inputs.token_ids_T[mine.first :],
            mine.end - mine.first, work.hidden_TG[mine.first :],
        )  # fmt: skip
    list_share(of_cache(arithmetic), heads, team, rows, weights.windows_L.max(), work.scratch.ahead)
    fetch_for_layer(arithmetic, team, sizes, rows.num_rows, 0, cache_L, work)
    for layer in range(sizes.num_layers):
        run_attention(
            arithmetic, team, sizes, heads, weights, layer, cache_L, rows, work, attention_work,
        )  # fmt: skip
        run_mlp(arithmetic, team, sizes, heads, weights, layer, rows.num_rows, work)


@kernel
def run_stage(
    arithmetic, sizes, heads, weights, cache_L, inputs, work, attention_work, outputs, member
):  # fmt: skip
    """Computes one micro-batch: activations in, activations or tokens and logits out.

    That is what the leader does; the other members do so whenever the leader calls them, until it
    closes the pipe. Arguments are the tuples of this module and of `core.kernels.attention.cpu`.
    `cache_L` is uint32 [L, blocks, KV heads, 2, words]; the rows' keys and values are added to it.
    Activations come and go in `work.hidden_TG`.
    """
    counts = inputs.counts
    while member.number == 0 or is_called(member.call, address(member.room)):
        team = Team(member.number, counts[NUM_MEMBERS], address(member.barrier))
        rows = RowTable(
            counts[NUM_ROWS], inputs.slots_T, inputs.positions_T, counts[BLOCK_TABLES],
            counts[TABLE_BYTES],
        )  # fmt: skip
        run_layers(
            arithmetic, team, sizes, heads, weights, cache_L, inputs, rows, work, attention_work
        )
        if inputs.projects:
            run_head(arithmetic, team, sizes, weights, inputs, work, outputs)
        if member.number == 0:
            return


__all__ = [
    "AttentionWorkspace",
    "HeadSizes",
    "RowTable",
    "StageInputs",
    "StageMember",
    "StageOutputs",
    "StageSizes",
    "StageWeights",
    "StageWorkspace",
    "run_stage",
]
