"""Chooses tokens on a GPU, next to the logits; the same tokens as the CPU, to the bit.

Letters: S rows, V vocabulary, N slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from core.kernels.cuda_device import Device
from core.kernels.sampling.cuda import RowParameters, row_parameters, sample_rows
from core.sampling.logprobs import PositionLogprobs
from core.sampling.sampler import NO_HISTORY, Sampler

MOST_ROWS_AT_A_TIME = 512


class DeviceLogits(NamedTuple):
    """Logits in the device's memory, and the ranks of each row's likeliest token."""

    logits_SV: torch.Tensor
    ranks_S: torch.Tensor

    @staticmethod
    def none() -> DeviceLogits:
        """No rows."""
        return DeviceLogits(torch.zeros((0, 0)), torch.zeros(0, dtype=torch.int64))


class CudaSampler(Sampler):
    """Draws on the device. Rows with penalties or log probabilities go to the host, and the
    others of their batch with them."""

    def __init__(self, device: Device, vocab_size: int, num_slots: int) -> None:
        self._device = device
        super().__init__(vocab_size, num_slots)
        with device.scope():
            # One array of words: the parameters in their order, and then the tokens.
            shape = (len(RowParameters._fields) + 1, MOST_ROWS_AT_A_TIME)
            self._pinned_PS = device.pinned(shape, torch.int64)
            self._device_PS = device.zeros(shape, torch.int64)
            self._compile(vocab_size)

    def _compile(self, vocab_size: int) -> None:
        """Draws once, so that no request waits for the compiler."""
        zeros, slot = self._device.zeros, np.zeros(1, np.int32)
        logits = DeviceLogits(zeros((1, vocab_size), torch.float32), zeros((1,), torch.int64))
        self._draw(logits, slot, slot)

    def sample(
        self,
        logits_SV: Any,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> tuple[list[int], tuple[PositionLogprobs | None, ...]]:
        if not isinstance(logits_SV, DeviceLogits):  # the first call compiles the host's kernels
            return super().sample(logits_SV, slots, positions)
        needs_host_S = self._num_logprobs_N[slots] >= 0
        needs_host_S |= self._history_lengths_N[slots] != NO_HISTORY
        if needs_host_S.any():
            with self._device.scope():
                host_SV = logits_SV.logits_SV.cpu().numpy()
            return super().sample(host_SV, slots, positions)
        token_ids: list[int] = []
        for first in range(0, len(slots), MOST_ROWS_AT_A_TIME):
            rows = slice(first, first + MOST_ROWS_AT_A_TIME)
            part = DeviceLogits(logits_SV.logits_SV[rows], logits_SV.ranks_S[rows])
            token_ids += self._draw(part, slots[rows], positions[rows])
        return token_ids, ()

    def _draw(
        self,
        logits: DeviceLogits,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> list[int]:
        count, num_parameters = len(slots), len(RowParameters._fields)
        host_PS = self._pinned_PS.numpy()
        for row, values in zip(host_PS, self._row_parameters(slots, positions), strict=False):
            row[:count] = values.view(np.int64)
        with self._device.scope():
            self._device_PS.copy_(self._pinned_PS, non_blocking=True)
            *words, tokens = (row[:count] for row in self._device_PS)
            view = self._device.view
            parameters = RowParameters._make(
                view(row.view(torch.float64) if field in _DOUBLES else row)
                for field, row in zip(RowParameters._fields, words, strict=True)
            )
            sample_rows(
                view(logits.logits_SV),
                view(logits.ranks_S),
                parameters,
                view(tokens),
                launch=self._device.launch(),
            )
            self._pinned_PS[num_parameters].copy_(
                self._device_PS[num_parameters], non_blocking=True
            )
        self._device.synchronize()
        token_ids: list[int] = host_PS[num_parameters, :count].tolist()
        return token_ids

    def _row_parameters(
        self, slots: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> RowParameters:
        return row_parameters(
            temperatures_S=self._temperatures_N[slots],
            top_ks_S=self._top_ks_N[slots],
            top_ps_S=self._top_ps_N[slots],
            min_ps_S=self._min_ps_N[slots],
            seeds_S=self._seeds_N[slots],
            positions_S=positions,
        )


_DOUBLES = ("scales_S", "top_ps_S")
