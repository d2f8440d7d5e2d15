"""Allocates what one stage holds: packed weights, KV cache and workspaces.

Letters: see `core.models.llama.model`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from core.engine.settings import EngineSettings
from core.kernels.ahead import AHEAD_SIZE
from core.kernels.arithmetic import LANES, PANEL_COLUMNS
from core.kernels.attention.cpu import TILE_QUERIES, AttentionWorkspace
from core.kernels.host_arithmetic import host_arithmetic
from core.kernels.linear.cpu import PanelScratch
from core.kernels.memory import aligned_zeros
from core.models.llama.config import LlamaConfig
from core.models.llama.model import (
    NUM_COUNTS,
    StageInputs,
    StageOutputs,
    StageWeights,
    StageWorkspace,
    WordArray,
)
from core.models.llama.packing import (
    VOCABULARY_PART,
    StageLayout,
    element_type,
    head_bias,
    layer_windows,
    pack_embedding,
    pack_final_norm,
    pack_head,
    pack_head_nibbles,
    pack_layer,
    place_matrices,
    rotary_angles,
)
from core.models.llama.weight_names import (
    LayerReader,
    head_has_nibbles,
    read_embedding_rows,
    read_final_norm,
    read_head_nibbles,
    read_head_rows,
)
from core.pipeline.plan import StageSlice
from core.weights.checkpoint import Checkpoint
from core.wire.codecs import codec_named

# A widened panel of this many inputs takes 1 MiB: half of a common second-level cache.
MOST_INPUTS_OF_WIDE_PANEL = 4096


def load_weights(
    layout: StageLayout, checkpoint: Checkpoint, stage_slice: StageSlice, *, num_positions: int
) -> StageWeights:
    """Reads and packs the stage's own tensors and no others.

    Raises CorruptWeights where one is missing or damaged.
    """
    config, first = layout.config, stage_slice.first_layer
    readers = [
        LayerReader(checkpoint, config, layer) for layer in range(first, stage_slice.end_layer)
    ]
    nibbles_LM = np.array([layout.nibbles_of_layer(reader) for reader in readers], np.bool_)
    offsets_LM, num_words = place_matrices(layout, nibbles_LM)
    panels = aligned_zeros((num_words,), np.uint32)
    vectors_L = aligned_zeros((len(readers), layout.layer_floats), np.float32)
    for layer, reader in enumerate(readers):
        mine = panels[offsets_LM[layer, 0] // 4 :]
        pack_layer(layout, reader, nibbles_LM[layer], mine, vectors_L[layer])
    elements = element_type(layout.arithmetic)
    embedding_VG = aligned_zeros((0, layout.hidden), elements)
    if stage_slice.is_first:
        rows = read_embedding_rows(checkpoint, config, count=VOCABULARY_PART)
        embedding_VG = pack_embedding(layout, rows)
    head_panels = aligned_zeros((0,), np.uint32)
    head_nibbles = False
    head_bias_V, final_norm_G = (aligned_zeros((0,), np.float32) for _ in range(2))
    if stage_slice.is_last:
        head_nibbles = layout.arithmetic.has_nibbles and head_has_nibbles(checkpoint, config)
        if head_nibbles:
            head_panels = pack_head_nibbles(layout, read_head_nibbles(checkpoint, config))
        else:
            rows = read_head_rows(checkpoint, config, count=VOCABULARY_PART)
            head_panels = pack_head(layout, rows)
        head_bias_V = head_bias(layout)
        final_norm_G = pack_final_norm(layout, read_final_norm(checkpoint, config))
    angles = rotary_angles(config, num_positions)
    return StageWeights(
        panels=panels,
        offsets_LM=offsets_LM,
        nibbles_LM=nibbles_LM,
        vectors_L=vectors_L,
        windows_L=layer_windows(config, first, stage_slice.end_layer),
        embedding_VG=embedding_VG,
        head_panels=head_panels,
        head_nibbles=head_nibbles,
        head_bias_V=head_bias_V,
        final_norm_G=final_norm_G,
        cos=angles.cos,
        sin=angles.sin,
    )


def allocate_cache(layout: StageLayout, num_layers: int, num_kv_blocks: int) -> WordArray:
    """The KV cache [L, blocks, KV heads, 2, words]; memory is taken as blocks are first used."""
    shape = (num_layers, num_kv_blocks, layout.config.num_kv_heads, 2, layout.block_words // 2)
    return aligned_zeros(shape, np.uint32)


def kv_bytes_per_block(
    config: LlamaConfig, stage_slice: StageSlice, settings: EngineSettings
) -> int:
    """Bytes of one KV block of 16 positions over all layers of the stage, and in its log."""
    layout = StageLayout(config, host_arithmetic(settings.number_format))
    num_layers = stage_slice.end_layer - stage_slice.first_layer
    kv_bytes = num_layers * config.num_kv_heads * layout.block_words * 4
    if not settings.keeps_log or stage_slice.is_last:
        return kv_bytes
    return kv_bytes + LANES * codec_named(settings.wire).row_bytes(config.hidden_size)


def allocate_workspaces(
    layout: StageLayout, settings: EngineSettings, *, projects: bool, num_members: int
) -> list[StageWorkspace]:
    """Buffers for `max_rows` rows, as each member sees them; those of the head only where the stage
    `projects`."""
    rows, sampled = settings.max_rows, settings.max_rows if projects else 0
    leaders = StageWorkspace(
        hidden_TG=aligned_zeros((rows, layout.hidden), np.float32),
        normed_T=aligned_zeros(
            (rows * layout.input_words(max(layout.hidden, layout.attention)),), np.uint32
        ),
        attended_T=aligned_zeros(
            (rows * layout.attention_input_words(layout.attention),), np.uint32
        ),
        qkv_TC=aligned_zeros((rows, layout.qkv), np.float32),
        intermediate_T=aligned_zeros((rows * layout.input_words(layout.intermediate),), np.uint32),
        sampled_hidden_SG=aligned_zeros((sampled, layout.hidden), np.float32),
        best_MS=aligned_zeros((num_members, sampled), np.float32),
        best_tokens_MS=aligned_zeros((num_members, sampled), np.int32),
        **_scratch(layout, rows=rows, sampled=sampled),
    )
    others = (
        leaders._replace(**_scratch(layout, rows=rows, sampled=sampled))
        for _ in range(1, num_members)
    )
    return [leaders, *others]


def _scratch(layout: StageLayout, *, rows: int, sampled: int) -> dict[str, Any]:
    """What each member has for itself."""
    return {
        "gate_up_T": aligned_zeros((rows * 2 * PANEL_COLUMNS,), np.float32),
        "panel_logits_S": aligned_zeros((sampled, PANEL_COLUMNS), np.float32),
        "head_scratch": aligned_zeros((layout.head_width,), np.uint32),
        "scratch": PanelScratch(
            wide_panel=aligned_zeros((PANEL_COLUMNS * MOST_INPUTS_OF_WIDE_PANEL,), np.float32),
            ahead=aligned_zeros((AHEAD_SIZE,), np.int64),
        ),
    }


def allocate_attention(layout: StageLayout, *, num_positions: int) -> AttentionWorkspace:
    """Buffers for one tile of queries over the longest sequence."""
    group = layout.config.num_heads // layout.config.num_kv_heads
    queries = max(TILE_QUERIES, group)
    kind = layout.arithmetic.of_cache
    positions = -(-num_positions // LANES) * LANES + 2 * LANES
    return AttentionWorkspace(
        queries_QW=aligned_zeros((queries, kind.query_bytes(layout.head_width) // 4), np.uint32),
        scores_QP=aligned_zeros((queries, positions), np.float32),
        weights_QP=aligned_zeros(
            (queries, positions // LANES * kind.weight_block_bytes // 4), np.uint32
        ),
        outputs_QD=aligned_zeros((queries, layout.head_width), np.float32),
        scales_Q=aligned_zeros((queries,), np.float32),
    )


def allocate_inputs(settings: EngineSettings, stage_slice: StageSlice) -> StageInputs:
    """Room for what a micro-batch of `max_rows` rows says."""
    return StageInputs(
        stage_slice.is_first,
        stage_slice.is_last,
        np.zeros(NUM_COUNTS, np.int64),
        *(np.zeros(settings.max_rows, np.int32) for _ in range(5)),
    )


def allocate_outputs(
    layout: StageLayout, settings: EngineSettings, *, projects: bool
) -> StageOutputs:
    """Room for one token and one row of logits for each row."""
    rows = settings.max_rows if projects else 0
    return StageOutputs(
        greedy_tokens_S=np.zeros(rows, np.int32),
        logits_SV=aligned_zeros((rows, layout.vocabulary), np.float32),
    )
