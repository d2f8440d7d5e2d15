"""A stage on the CPU: one compiled call for each micro-batch and thread, without the GIL.

Letters: see `core.models.llama.model`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.engine.backend import StageRows
from core.engine.cpu_team import CpuTeam
from core.engine.port import make_port
from core.engine.settings import EngineSettings
from core.engine.stage_memory import (
    allocate_attention,
    allocate_cache,
    allocate_inputs,
    allocate_outputs,
    allocate_workspaces,
    load_weights,
)
from core.kernels.arithmetic import Arithmetic
from core.kernels.fingerprint import kernel_cache_key
from core.kernels.host_arithmetic import host_arithmetic
from core.models.llama.config import LlamaConfig
from core.models.llama.model import (
    BLOCK_TABLES,
    NUM_GREEDY,
    NUM_LOGITS,
    NUM_MEMBERS,
    NUM_ROWS,
    TABLE_BYTES,
    run_stage,
)
from core.models.llama.packing import StageLayout
from core.pipeline.plan import StageSlice
from core.sampling.sampler import Sampler
from core.weights.checkpoint import Checkpoint

_NO_ROWS = np.zeros(0, np.int32)


class CpuOutputs(NamedTuple):
    """Buffers that every call writes anew."""

    greedy_tokens_S: npt.NDArray[np.int32]
    logits_SV: npt.NDArray[np.float32]
    is_finite_S: npt.NDArray[np.bool_]


class CpuBackend:
    """Packed weights, KV cache and workspaces. Used by one thread at a time.

    Construction reads and packs the weights and compiles (or loads) the kernels.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        stage_slice: StageSlice,
        settings: EngineSettings,
        *,
        num_positions: int,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """`arithmetic` overrides the host's best. Raises CorruptWeights."""
        self._arithmetic = arithmetic or host_arithmetic(settings.number_format)
        self._config = config
        self._stage_slice = stage_slice
        self._settings = settings
        projects = stage_slice.is_last
        num_layers = stage_slice.end_layer - stage_slice.first_layer
        layout = StageLayout(config, self._arithmetic)
        self._weights = load_weights(layout, checkpoint, stage_slice, num_positions=num_positions)
        self._cache = allocate_cache(layout, num_layers, settings.num_kv_blocks)
        self._most_members = max(settings.num_threads, settings.num_threads_alone)
        works = allocate_workspaces(
            layout, settings, projects=projects, num_members=self._most_members
        )
        self._inputs = allocate_inputs(settings, stage_slice)
        self._work = works[0]
        self._outputs = allocate_outputs(layout, settings, projects=projects)
        self._port = make_port(
            settings.wire,
            self._arithmetic.unquantised,
            hidden_TG=self._work.hidden_TG,
            hidden_size=config.hidden_size,
        )
        sizes = layout.stage_sizes(num_layers, rounds_residual=settings.wire == "bf16")
        self._team = CpuTeam(
            [
                functools.partial(
                    run_stage,
                    self._arithmetic,
                    sizes,
                    layout.head_sizes(),
                    self._weights,
                    self._cache,
                    self._inputs,
                    work,
                    allocate_attention(layout, num_positions=num_positions),
                    self._outputs,
                )
                for work in works
            ]
        )
        self._warm_up()

    @property
    def weights_bytes(self) -> int:
        return sum(part.nbytes for part in self.weight_arrays.values())

    @property
    def weight_arrays(self) -> dict[str, npt.NDArray[Any]]:
        parts = self._weights._asdict()
        return {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}

    @property
    def fingerprint(self) -> str:
        return f"{self._arithmetic.name}-{self._settings.wire}-{kernel_cache_key()}"

    def make_sampler(self) -> Sampler:
        return Sampler(self._config.vocab_size, self._settings.num_slots)

    def prepare(self, rows: StageRows) -> None:
        """Puts a micro-batch where the members look for it."""
        inputs, num_rows = self._inputs, rows.num_rows
        for target, source, count in (
            (inputs.token_ids_T, rows.token_ids_T, num_rows),
            (inputs.slots_T, rows.slots_T, num_rows),
            (inputs.positions_T, rows.positions_T, num_rows),
            (inputs.greedy_rows_S, rows.greedy_rows, len(rows.greedy_rows)),
            (inputs.logits_rows_S, rows.logits_rows, len(rows.logits_rows)),
        ):
            target[:count] = source[:count]
        inputs.counts[NUM_ROWS] = num_rows
        inputs.counts[NUM_GREEDY] = len(rows.greedy_rows)
        inputs.counts[NUM_LOGITS] = len(rows.logits_rows)
        inputs.counts[BLOCK_TABLES] = rows.block_tables_SB.ctypes.data
        inputs.counts[TABLE_BYTES] = rows.block_tables_SB.strides[0]

    def take(self, rows_TH: npt.NDArray[Any] | None, *, num_rows: int) -> None:
        self._port.take(rows_TH, num_rows=num_rows)

    def give(self, num_rows: int) -> npt.NDArray[Any]:
        return self._port.give(num_rows)

    def run(self, rows: StageRows) -> CpuOutputs:
        """One call into compiled code, or one of each member of the team."""
        most = self._most_members if rows.is_alone else self._settings.num_threads
        num_members = self._team.choose(most)
        self._inputs.counts[NUM_MEMBERS] = num_members
        self._team.run(num_members)
        logits_SV = self._outputs.logits_SV[: len(rows.logits_rows), : self._config.vocab_size]
        return CpuOutputs(self._outputs.greedy_tokens_S, logits_SV, self._are_finite(rows))

    def _are_finite(self, rows: StageRows) -> npt.NDArray[np.bool_]:
        """By what enters the final norm: one NaN or infinity makes all logits of its row NaN, and
        integers of NaN may be anything."""
        sampled = np.concatenate([rows.greedy_rows, rows.logits_rows])
        with np.errstate(invalid="ignore", over="ignore"):
            return np.isfinite(self._work.hidden_TG[sampled].sum(axis=1))

    def host_logits(self, outputs: Any, num_rows: int) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(outputs.logits_SV[:num_rows])

    def _warm_up(self) -> None:
        """Runs no rows, so that no request waits for a compiler."""
        nothing = np.zeros(self._settings.max_rows, np.int32)
        rows = StageRows(
            num_rows=0,
            is_alone=True,
            token_ids_T=nothing,
            slots_T=nothing,
            positions_T=nothing,
            block_tables_SB=np.zeros((1, 1), np.int32),
            greedy_rows=_NO_ROWS,
            logits_rows=_NO_ROWS,
        )
        self.prepare(rows)
        self.run(rows)
