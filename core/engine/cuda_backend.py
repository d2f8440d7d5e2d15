"""A stage on a GPU: one graph for the layers, and one for the head, for each micro-batch.

Rows are padded to the next of a few sizes, and each size has its own graphs, captured when
the stage is made. Products come from torch's libraries, which may sum in another order for
another size: a row's bits depend on its padded size, but not on what the other rows are, nor
on the run.

Letters: T rows, H hidden size, R slots, M blocks of the longest sequence, S sampled rows,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from core.engine.backend import StageRows
from core.engine.cuda_sampler import CudaSampler, DeviceLogits
from core.engine.port import host_port
from core.engine.sequences import BLOCK_SIZE
from core.engine.settings import EngineSettings
from core.errors import Exhausted
from core.kernels.attention.cuda import num_splits
from core.kernels.cuda_device import CudaDevice, Device
from core.kernels.fingerprint import cuda_kernel_key
from core.kernels.packing.cuda import scatter_rows
from core.kernels.sampling.cuda import CODE_OF_MINUS_INFINITY, ID_BITS, token_ids_of
from core.models.llama.config import LlamaConfig
from core.models.llama.cuda_model import CudaStage, StageCapacity
from core.models.llama.cuda_weights import load_cuda_weights
from core.pipeline.plan import StageSlice
from core.sampling.sampler import Sampler
from core.weights.checkpoint import Checkpoint

# Powers of two, and from here on also what lies half-way between them.
FIRST_HALFWAY = 32
SPLITS_STEP = 4
_CODE_OF_INFINITY = 0xFF800000  # as a rank has it; NaN's is 0


class CudaOutputs(NamedTuple):
    """Tokens are there already, logits stay on the device."""

    greedy_tokens_S: npt.NDArray[np.int32]
    logits_SV: DeviceLogits
    is_finite_S: npt.NDArray[np.bool_]


class CudaBackend:
    """Weights, KV cache, buffers and graphs on one GPU. Used by one thread at a time.

    Construction reads the weights, compiles the kernels and captures the graphs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        stage_slice: StageSlice,
        settings: EngineSettings,
        *,
        num_positions: int,
        device: Device | None = None,
    ) -> None:
        """Raises CorruptWeights, and Exhausted where the device has too little memory."""
        self._device = device or CudaDevice()
        self._config = config
        self._graphs: list[Callable[[], None]] = []  # of the rows that are prepared
        self._stage_slice = stage_slice
        self._settings = settings
        with _refusing_what_does_not_fit(settings), self._device.scope():
            self._weights = load_cuda_weights(
                self._device,
                checkpoint,
                config,
                first_layer=stage_slice.first_layer,
                end_layer=stage_slice.end_layer,
                number_format=settings.number_format,
            )
            self._stage = self._make_stage(num_positions)
            self._allocate_host_buffers()
            self._send_tables(1)  # compiles its kernel, which no graph holds
        with _refusing_what_does_not_fit(settings):
            self._capture(num_positions)

    @property
    def weights_bytes(self) -> int:
        return self._weights.num_bytes

    @property
    def weight_arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {}  # a device's memory corrects its own errors, or has none to tell

    @property
    def fingerprint(self) -> str:
        arithmetic = f"{self._device.name}-{self._settings.number_format}"
        return f"{arithmetic}-{self._settings.wire}-{cuda_kernel_key()}"

    def make_sampler(self) -> Sampler:
        return CudaSampler(self._device, self._config.vocab_size, self._settings.num_slots)

    def prepare(self, rows: StageRows) -> None:
        """Writes to pinned memory what the graphs read there, and sends new block tables."""
        longest = int(rows.positions_T[: rows.num_rows].max()) + 1
        row_size = _padded(rows.num_rows, self._row_sizes)
        split_size = _padded(num_splits(longest), self._split_sizes)
        self._graphs = [self._layer_graphs[row_size, split_size]]
        sampled_rows = np.concatenate([rows.greedy_rows, rows.logits_rows])
        if len(sampled_rows):
            size = _padded(len(sampled_rows), self._row_sizes)
            self._host_sampled_S[: len(sampled_rows)] = sampled_rows
            self._host_sampled_S[len(sampled_rows) : size] = 0
            self._graphs.append(self._head_graphs[size])
        self._write_rows(rows, row_size)
        self._send_block_tables(rows, longest)

    def take(self, rows_TH: npt.NDArray[Any] | None, *, num_rows: int) -> None:
        self._port.take(rows_TH, num_rows=num_rows)

    def run(self, rows: StageRows) -> CudaOutputs:
        """Replays the graphs of the padded number of rows."""
        with self._device.scope():
            for replay in self._graphs:
                replay()
        self._device.synchronize()
        return self._outputs(len(rows.greedy_rows), len(rows.logits_rows))

    def give(self, num_rows: int) -> npt.NDArray[Any]:
        return self._port.give(num_rows)

    def host_logits(self, outputs: Any, num_rows: int) -> npt.NDArray[np.float32]:
        with self._device.scope():
            logits_SV: torch.Tensor = outputs.logits_SV.logits_SV
            return logits_SV[:num_rows].cpu().numpy()

    def _make_stage(self, num_positions: int) -> CudaStage:
        first, end = self._stage_slice.first_layer, self._stage_slice.end_layer
        windows = self._config.windows or (None,) * self._config.num_layers
        capacity = StageCapacity(
            max_rows=self._settings.max_rows,
            num_slots=self._settings.num_slots,
            num_kv_blocks=self._settings.num_kv_blocks,
            block_size=BLOCK_SIZE,
            num_positions=num_positions,
            number_format=self._settings.number_format,
            rounds_residual=self._settings.wire == "bf16",
        )
        return CudaStage(
            self._device, self._config, self._weights, capacity, windows=windows[first:end]
        )

    def _allocate_host_buffers(self) -> None:
        """Pinned memory that copies to and from the device start or end in."""
        settings, pinned = self._settings, self._device.pinned
        self._pinned_inputs_3T = pinned((3, settings.max_rows), torch.int32)
        self._host_inputs_3T = self._pinned_inputs_3T.numpy()
        self._pinned_sampled_S = pinned((settings.max_rows,), torch.int32)
        self._host_sampled_S = self._pinned_sampled_S.numpy()
        self._pinned_ranks_S = pinned((settings.max_rows,), torch.int64)
        hidden_shape = (settings.max_rows, self._config.hidden_size)
        wire_type = torch.bfloat16 if settings.wire == "bf16" else torch.float32
        self._wire_TH = self._device.zeros(hidden_shape, wire_type)
        self._pinned_hidden_TH = pinned(hidden_shape, wire_type)
        seen_as = torch.uint16 if settings.wire == "bf16" else torch.float32
        self._port = host_port(settings.wire, self._pinned_hidden_TH.view(seen_as).numpy())
        tables_shape = tuple(self._stage.block_tables_RM.shape)
        self._known_tables_RM = np.zeros(tables_shape, np.int32)
        self._pinned_tables_RM = pinned(tables_shape, torch.int32)
        self._pinned_slots_R = pinned((settings.num_slots,), torch.int32)
        self._sent_tables_RM = self._device.zeros(tables_shape, torch.int32)
        self._sent_slots_R = self._device.zeros((settings.num_slots,), torch.int32)

    def _capture(self, num_positions: int) -> None:
        """Makes the graphs, the largest first, so that the others fit into its memory."""
        self._row_sizes = row_sizes(self._settings.max_rows)
        self._split_sizes = split_sizes(num_positions)
        capture = self._device.capture
        self._layer_graphs = {
            (rows, splits): capture(partial(self._run_layers, rows, splits))
            for rows in reversed(self._row_sizes)
            for splits in reversed(self._split_sizes)
        }
        self._head_graphs = {
            rows: capture(partial(self._run_head, rows))
            for rows in reversed(self._row_sizes)
            if self._stage_slice.is_last
        }

    def _run_layers(self, num_rows: int, splits: int) -> None:
        """From pinned memory through all layers, and back to it but on a last stage.

        Copies belong to the graph: a call of its own for each takes the host longer.
        """
        stage, wire_TH = self._stage, self._wire_TH[:num_rows]
        stage.inputs_3T.copy_(self._pinned_inputs_3T, non_blocking=True)
        if not self._stage_slice.is_first:
            wire_TH.copy_(self._pinned_hidden_TH[:num_rows], non_blocking=True)
            stage.residual_TH[:num_rows].copy_(wire_TH)
        stage.run_layers(num_rows, splits)
        if not self._stage_slice.is_last:
            wire_TH.copy_(stage.residual_TH[:num_rows])
            self._pinned_hidden_TH[:num_rows].copy_(wire_TH, non_blocking=True)

    def _run_head(self, num_sampled: int) -> None:
        """From the sampled rows in pinned memory to the ranks of their tokens, there too."""
        self._stage.sampled_rows_S.copy_(self._pinned_sampled_S, non_blocking=True)
        self._stage.run_head(num_sampled)
        ranks_S = self._stage.ranks_S[:num_sampled]
        self._pinned_ranks_S[:num_sampled].copy_(ranks_S, non_blocking=True)

    def _write_rows(self, rows: StageRows, row_size: int) -> None:
        """Token ids, slots and positions; padding stands at position -1."""
        count = rows.num_rows
        host_3T = self._host_inputs_3T
        for row, source_T in zip(
            host_3T, (rows.token_ids_T, rows.slots_T, rows.positions_T), strict=True
        ):
            row[:count] = source_T[:count]
        host_3T[:2, count:row_size] = 0
        host_3T[2, count:row_size] = -1

    def _send_block_tables(self, rows: StageRows, longest: int) -> None:
        """Those tables of the rows' sequences that differ from what the device has."""
        num_blocks = -(-longest // BLOCK_SIZE)
        slots_R = np.unique(rows.slots_T[: rows.num_rows])
        used_RM, known_RM = (
            tables[:, :num_blocks][slots_R]
            for tables in (rows.block_tables_SB, self._known_tables_RM)
        )
        slots_R = slots_R[(used_RM != known_RM).any(axis=1)]
        count = len(slots_R)
        if not count:
            return
        # Rows that were prepared and not run may have left a copy under way.
        self._device.synchronize()
        wanted_RM = rows.block_tables_SB[slots_R]
        self._known_tables_RM[slots_R] = wanted_RM
        self._pinned_slots_R.numpy()[:count] = slots_R
        self._pinned_tables_RM.numpy()[:count] = wanted_RM
        with self._device.scope():
            self._send_tables(count)

    def _send_tables(self, count: int) -> None:
        """The first pinned tables to the slots that are named beside them."""
        sent_RM, sent_slots_R = self._sent_tables_RM[:count], self._sent_slots_R[:count]
        sent_RM.copy_(self._pinned_tables_RM[:count], non_blocking=True)
        sent_slots_R.copy_(self._pinned_slots_R[:count], non_blocking=True)
        view = self._device.view
        scatter_rows(
            view(sent_RM),
            view(sent_slots_R),
            view(self._stage.block_tables_RM),
            launch=self._device.launch(),
        )

    def _outputs(self, num_greedy: int, num_logits: int) -> CudaOutputs:
        if not self._stage_slice.is_last:
            nothing = np.zeros(0, np.int32)
            return CudaOutputs(nothing, DeviceLogits.none(), nothing.astype(np.bool_))
        ranks_S = self._pinned_ranks_S.numpy()[: num_greedy + num_logits]
        tokens_S = token_ids_of(ranks_S[:num_greedy]).astype(np.int32)
        rows = slice(num_greedy, num_greedy + num_logits)
        logits = DeviceLogits(self._stage.logits_SV[rows], self._stage.ranks_S[rows])
        codes_S = ranks_S >> ID_BITS
        is_finite_S = (codes_S > CODE_OF_MINUS_INFINITY) & (codes_S < _CODE_OF_INFINITY)
        return CudaOutputs(tokens_S, logits, is_finite_S)


def row_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are made for; the last is `max_rows`."""
    sizes = []
    size = 1
    while size < max_rows:
        sizes.append(size)
        if size >= FIRST_HALFWAY and size * 3 // 2 < max_rows:
            sizes.append(size * 3 // 2)
        size *= 2
    return [*sizes, max_rows]


def split_sizes(num_positions: int) -> list[int]:
    """Numbers of splits that graphs are made for; the last one is enough for any sequence."""
    most = num_splits(num_positions)
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= SPLITS_STEP
    return [*sizes, most]


def _padded(count: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= count)


@contextmanager
def _refusing_what_does_not_fit(settings: EngineSettings) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Exhausted(
            f"the GPU's memory does not hold the stage's weights with {settings.num_kv_blocks} "
            f"KV blocks and {settings.max_rows} rows; give it less KV memory, or fewer layers"
        ) from error
