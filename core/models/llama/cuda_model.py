"""A stage of a Llama-architecture decoder on a CUDA device.

The work on a number of rows is a fixed series of kernels and products over buffers that
never move, so that a graph can hold it. What follows the rows (token ids, slots, positions,
block tables) is read by the kernels from memory.

Letters: T rows, H hidden size, C columns of q, k and v together, N query heads, K KV heads, D
elements in a head, W words of a head, F intermediate size, B blocks of the cache, P positions
in a block, L positions in a table, R slots, M blocks of the longest sequence, S sampled rows,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from core.kernels.activation.cuda import silu_multiply
from core.kernels.attention.cuda import Partials, num_splits, paged_attention
from core.kernels.cuda_device import Device
from core.kernels.cuda_numbers import number_format_of
from core.kernels.norm.cuda import add, add_rms_norm, rms_norm
from core.kernels.packing.cuda import gather_rows, gather_widened_rows
from core.kernels.rotary.cuda import rotate_and_write
from core.kernels.sampling.cuda import rank_likeliest
from core.models.llama.config import LlamaConfig
from core.models.llama.cuda_weights import ELEMENT_TYPES, CudaLayer, CudaWeights
from core.models.llama.packing import rotary_angles

# (row, split) pairs whose partial results of attention have room at a time.
MOST_PARTIALS = 8192


@dataclass(frozen=True, kw_only=True)
class StageCapacity:
    """How much a stage on a device holds."""

    max_rows: int
    num_slots: int
    num_kv_blocks: int
    block_size: int
    num_positions: int  # of the longest sequence
    number_format: str
    rounds_residual: bool  # to bfloat16 after every layer, as the wire carries it


class CudaStage:
    """Layers, and on a last stage the head, over buffers for `max_rows` rows."""

    def __init__(
        self,
        device: Device,
        config: LlamaConfig,
        weights: CudaWeights,
        capacity: StageCapacity,
        *,
        windows: tuple[int | None, ...],
    ) -> None:
        """Raises torch.OutOfMemoryError."""
        self._device = device
        self._config = config
        self._weights = weights
        self._capacity = capacity
        self._windows = windows
        self._allocate_inputs()
        self._allocate_rows()
        self._allocate_cache()
        self._allocate_partials()
        if weights.head_VH is not None:
            self._allocate_outputs()

    def run_layers(self, num_rows: int, splits: int) -> None:
        """Rows of the residual stream through all layers; looks up tokens on a first stage.

        Sequences are at most `splits` splits long.
        """
        launch, view = self._device.launch(), self._device.view
        residual_TH = view(self.residual_TH[:num_rows])
        if self._weights.embedding_VH is not None:
            gather_widened_rows(
                view(self._weights.embedding_VH),
                view(self.token_ids_T[:num_rows]),
                residual_TH,
                number_format=self._capacity.number_format,
                launch=launch,
            )
        before: CudaLayer | None = None
        for index, layer in enumerate(self._weights.layers):
            self._norm(num_rows, before, layer.attention_norm_H, ends_layer=True)
            self._attend(num_rows, splits, index, layer)
            self._device.multiply(
                self._attended_TP[:num_rows], layer.output_HP, self._added_TH[:num_rows]
            )
            self._norm_between(num_rows, layer)
            self._multiply_mlp(num_rows, layer)
            before = layer
        assert before is not None
        add(
            residual_TH,
            view(self._added_TH[:num_rows]),
            view(before.down_bias_H),
            rounds=self._capacity.rounds_residual,
            launch=launch,
        )

    def run_head(self, num_sampled: int) -> None:
        """Logits of the rows named in `sampled_rows_S`, and the ranks of their likeliest tokens."""
        launch, view = self._device.launch(), self._device.view
        assert self._weights.head_VH is not None
        assert self._weights.final_norm_H is not None
        sampled_SH = view(self._sampled_SH[:num_sampled])
        rows = view(self.sampled_rows_S[:num_sampled])
        gather_rows(view(self.residual_TH), rows, sampled_SH, launch=launch)
        rms_norm(
            sampled_SH,
            view(self._weights.final_norm_H),
            view(self._normed_TH[:num_sampled]),
            eps=self._config.norm_eps,
            number_format=self._capacity.number_format,
            launch=launch,
        )
        logits_SV, ranks_S = self.logits_SV[:num_sampled], self.ranks_S[:num_sampled]
        self._device.multiply(self._normed_TH[:num_sampled], self._weights.head_VH, logits_SV)
        ranks_S.zero_()
        rank_likeliest(view(logits_SV), view(ranks_S), launch=launch)

    def _norm(
        self, num_rows: int, before: CudaLayer | None, weight_H: torch.Tensor, *, ends_layer: bool
    ) -> None:
        """Norms the residual stream for a layer, after adding what the layer before has left."""
        launch, view = self._device.launch(), self._device.view
        residual_TH, normed_TH = (
            view(rows[:num_rows]) for rows in (self.residual_TH, self._normed_TH)
        )
        options: dict[str, Any] = dict(
            eps=self._config.norm_eps, number_format=self._capacity.number_format, launch=launch
        )
        if before is None:
            rms_norm(residual_TH, view(weight_H), normed_TH, **options)
            return
        add_rms_norm(
            residual_TH,
            view(self._added_TH[:num_rows]),
            view(before.down_bias_H),
            view(weight_H),
            normed_TH,
            rounds=ends_layer and self._capacity.rounds_residual,
            **options,
        )

    def _norm_between(self, num_rows: int, layer: CudaLayer) -> None:
        """Adds what attention has left, and norms for the second half of the layer."""
        view = self._device.view
        add_rms_norm(
            view(self.residual_TH[:num_rows]),
            view(self._added_TH[:num_rows]),
            view(layer.output_bias_H),
            view(layer.mlp_norm_H),
            view(self._normed_TH[:num_rows]),
            eps=self._config.norm_eps,
            number_format=self._capacity.number_format,
            rounds=False,
            launch=self._device.launch(),
        )

    def _attend(self, num_rows: int, splits: int, index: int, layer: CudaLayer) -> None:
        view = self._device.view
        self._device.multiply(self._normed_TH[:num_rows], layer.qkv_CH, self._qkv_TC[:num_rows])
        keys_BPKD, values_BPKD = self._cache[index]
        rotate_and_write(
            view(self._qkv_TC[:num_rows]),
            view(layer.qkv_bias_C),
            q_norm_D=view(layer.q_norm_D),
            k_norm_D=view(layer.k_norm_D),
            norm_eps=self._config.norm_eps if self._config.qk_norm else None,
            slots_T=view(self.slots_T[:num_rows]),
            positions_T=view(self.positions_T[:num_rows]),
            block_tables_SM=view(self.block_tables_RM),
            cos_LF=view(self._cos_LF),
            sin_LF=view(self._sin_LF),
            keys_BPKD=view(keys_BPKD),
            values_BPKD=view(values_BPKD),
            out_TND=view(self._q_TND[:num_rows]),
            number_format=self._capacity.number_format,
            launch=self._device.launch(),
        )
        # Rows take turns where the partial results of all have no room.
        turn = max(1, self._most_partials // splits)
        for first in range(0, num_rows, turn):
            rows = slice(first, min(first + turn, num_rows))
            paged_attention(
                view(self._q_TND[rows]),
                view(keys_BPKD.view(torch.int64)),
                view(values_BPKD.view(torch.int64)),
                block_tables_SM=view(self.block_tables_RM),
                slots_T=view(self.slots_T[rows]),
                positions_T=view(self.positions_T[rows]),
                window=self._windows[index],
                partials=self._partials(rows.stop - first, splits),
                out_TND=view(self._attended_TND[rows]),
                number_format=self._capacity.number_format,
                launch=self._device.launch(),
            )

    def _multiply_mlp(self, num_rows: int, layer: CudaLayer) -> None:
        view = self._device.view
        gate_up_T2F, inner_TF = self._gate_up_T2F[:num_rows], self._inner_TF[:num_rows]
        self._device.multiply(self._normed_TH[:num_rows], layer.gate_up_2FH, gate_up_T2F)
        silu_multiply(
            view(gate_up_T2F),
            view(layer.gate_up_bias_2F),
            view(inner_TF),
            number_format=self._capacity.number_format,
            launch=self._device.launch(),
        )
        self._device.multiply(inner_TF, layer.down_HF, self._added_TH[:num_rows])

    def _partials(self, num_rows: int, splits: int) -> Partials:
        heads, head_dim = self._config.num_heads, self._config.head_dim
        count = num_rows * splits * heads
        sums_TXND = self._sums[: count * head_dim].view(num_rows, splits, heads, head_dim)
        maxima_TXN, totals_TXN = (
            flat[:count].view(num_rows, splits, heads) for flat in (self._maxima, self._totals)
        )
        return Partials(*map(self._device.view, (sums_TXND, maxima_TXN, totals_TXN)))

    def _allocate_inputs(self) -> None:
        """What follows the rows: one array, so that one copy brings it."""
        capacity, zeros = self._capacity, self._device.zeros
        self.inputs_3T = zeros((3, capacity.max_rows), torch.int32)
        self.token_ids_T, self.slots_T, self.positions_T = self.inputs_3T
        self.positions_T.fill_(-1)  # padding
        longest = -(-capacity.num_positions // capacity.block_size)
        self.block_tables_RM = zeros((capacity.num_slots, longest), torch.int32)
        angles = rotary_angles(self._config, capacity.num_positions)
        self._cos_LF, self._sin_LF = (
            zeros(table.shape, torch.float32).copy_(torch.from_numpy(table))
            for table in (angles.cos, angles.sin)
        )

    def _allocate_rows(self) -> None:
        config, zeros, rows = self._config, self._device.zeros, self._capacity.max_rows
        hidden, inner = config.hidden_size, config.intermediate_size
        head_dim, num_heads = config.head_dim, config.num_heads
        elements = ELEMENT_TYPES[self._capacity.number_format]
        columns = (num_heads + 2 * config.num_kv_heads) * head_dim
        self.residual_TH, self._added_TH = (zeros((rows, hidden), torch.float32) for _ in range(2))
        self._normed_TH = zeros((rows, hidden), elements)
        self._qkv_TC = zeros((rows, columns), torch.float32)
        self._q_TND = zeros((rows, num_heads, head_dim), torch.float32)
        self._attended_TND = zeros((rows, num_heads, head_dim), elements)
        self._attended_TP = self._attended_TND.view(rows, num_heads * head_dim)
        self._gate_up_T2F = zeros((rows, 2 * inner), torch.float32)
        self._inner_TF = zeros((rows, inner), elements)

    def _allocate_cache(self) -> None:
        """Keys and values of every layer; heads are padded to whole words with zeros."""
        config, capacity = self._config, self._capacity
        width = padded_head_dim(config, capacity.number_format)
        block = (capacity.block_size, config.num_kv_heads, width)
        shape = (len(self._weights.layers), 2, capacity.num_kv_blocks, *block)
        self._cache = self._device.zeros(shape, ELEMENT_TYPES[capacity.number_format])

    def _allocate_partials(self) -> None:
        config, capacity = self._config, self._capacity
        most_splits = num_splits(capacity.num_positions)
        self._most_partials = max(most_splits, min(MOST_PARTIALS, most_splits * capacity.max_rows))
        count = self._most_partials * config.num_heads
        self._sums = self._device.zeros((count * config.head_dim,), torch.float32)
        self._maxima, self._totals = (self._device.zeros((count,), torch.float32) for _ in range(2))

    def _allocate_outputs(self) -> None:
        zeros, rows = self._device.zeros, self._capacity.max_rows
        self.sampled_rows_S = zeros((rows,), torch.int32)
        self._sampled_SH = zeros((rows, self._config.hidden_size), torch.float32)
        self.logits_SV = zeros((rows, self._config.vocab_size), torch.float32)
        self.ranks_S = zeros((rows,), torch.int64)


def padded_head_dim(config: LlamaConfig, number_format: str) -> int:
    """Elements of a head in the cache: whole words."""
    per_word: int = number_format_of(number_format).per_word
    return -(-config.head_dim // per_word) * per_word
