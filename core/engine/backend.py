"""What an engine needs of whoever computes for it.

Letters: T rows, H hidden size, S rows whose token or logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.engine.settings import EngineSettings
from core.models.llama.config import LlamaConfig
from core.pipeline.plan import StageSlice
from core.sampling.sampler import Sampler
from core.weights.checkpoint import Checkpoint

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class StageRows:
    """The rows of a micro-batch, checked; arrays may be longer than `num_rows`."""

    num_rows: int
    is_alone: bool  # whether nothing else is being computed, as far as is known
    token_ids_T: IntArray  # of meaning on the first stage only
    slots_T: IntArray
    positions_T: IntArray
    block_tables_SB: IntArray
    greedy_rows: IntArray  # rows whose likeliest token is wanted
    logits_rows: IntArray  # rows whose logits are wanted


class StageOutputs(Protocol):
    """What a last stage has computed; valid until the next call."""

    @property
    def greedy_tokens_S(self) -> IntArray:
        """The likeliest token of each of `greedy_rows`; may be longer."""

    @property
    def is_finite_S(self) -> npt.NDArray[np.bool_]:
        """Whether the result of each of `greedy_rows`, and then of `logits_rows`, is numbers."""

    @property
    def logits_SV(self) -> Any:
        """Float32 logits of each of `logits_rows`, as the backend's own sampler takes them."""


class Backend(Protocol):
    """Weights, KV cache and arithmetic of one stage, on one device."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in memory."""

    @property
    def weight_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Those in the host's memory, by names for people; nobody writes to them."""

    @property
    def fingerprint(self) -> str:
        """Equal where equal weights compute equal bits."""

    def make_sampler(self) -> Sampler:
        """A sampler of the backend's logits."""

    def prepare(self, rows: StageRows) -> None:
        """Notes which rows are to be computed, before their activations are there."""

    def take(self, rows_TH: npt.NDArray[Any] | None, *, num_rows: int) -> None:
        """Takes activations in. Raises ProtocolViolation where shape or dtype differ."""

    def run(self, rows: StageRows) -> StageOutputs:
        """Computes the rows prepared last; their activations have been taken, or are looked up by
        token id."""

    def give(self, num_rows: int) -> npt.NDArray[Any]:
        """Returns the activations [T, H] of a run, C order, valid until the next call."""

    def host_logits(self, outputs: StageOutputs, num_rows: int) -> npt.NDArray[np.float32]:
        """The first `num_rows` rows of the outputs' logits [S, V], in memory of the host."""


class MakeBackend(Protocol):
    """Reads the weights of a slice and prepares everything that a micro-batch needs."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        stage_slice: StageSlice,
        settings: EngineSettings,
        *,
        num_positions: int,
    ) -> Backend:
        """Sequences are at most `num_positions` long. Raises CorruptWeights."""
