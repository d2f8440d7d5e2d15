"""Weights of a stage in a device's memory, matrices in the number format as [out, in].

Letters: H hidden size, F intermediate size, P columns of all query heads, C columns of q, k and
v together, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.kernels.cuda_device import Device
from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import LayerWeights, read_embedding, read_head, read_layer
from core.weights.checkpoint import Checkpoint

Array = npt.NDArray[np.float32]
ELEMENT_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class CudaLayer:
    """One decoder layer. Biases and norms are float32; those that the model lacks are zero."""

    attention_norm_H: torch.Tensor
    qkv_CH: torch.Tensor
    qkv_bias_C: torch.Tensor
    q_norm_D: torch.Tensor
    k_norm_D: torch.Tensor
    output_HP: torch.Tensor
    output_bias_H: torch.Tensor
    mlp_norm_H: torch.Tensor
    gate_up_2FH: torch.Tensor
    gate_up_bias_2F: torch.Tensor
    down_HF: torch.Tensor
    down_bias_H: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CudaWeights:
    """What a stage holds: the embedding on the first one, norm and head on the last."""

    layers: tuple[CudaLayer, ...]
    embedding_VH: torch.Tensor | None
    final_norm_H: torch.Tensor | None
    head_VH: torch.Tensor | None  # the embedding itself, where the stage has both and they are one

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them; what is shared counts once."""
        tensors = [getattr(layer, field.name) for layer in self.layers for field in fields(layer)]
        tensors += [self.embedding_VH, self.final_norm_H, self.head_VH]
        distinct = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor is not None}
        return sum(distinct.values())


def load_cuda_weights(
    device: Device,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    *,
    first_layer: int,
    end_layer: int,
    number_format: str,
) -> CudaWeights:
    """Reads the stage's own tensors and no others, and moves them to the device.

    Raises CorruptWeights where one is missing or damaged, torch.OutOfMemoryError.
    """
    loader = _Loader(device, ELEMENT_TYPES[number_format])
    layers = tuple(
        loader.layer(read_layer(checkpoint, config, layer), config)
        for layer in range(first_layer, end_layer)
    )
    embedding_VH = final_norm_H = head_VH = None
    if first_layer == 0:
        embedding_VH = loader.matrix([read_embedding(checkpoint, config)])
    if end_layer == config.num_layers:
        head = read_head(checkpoint, config)
        final_norm_H = loader.vector([head.final_norm_H], [config.hidden_size])
        is_shared = config.tied_head and embedding_VH is not None
        head_VH = embedding_VH if is_shared else loader.matrix([head.head_VH])
    return CudaWeights(
        layers=layers, embedding_VH=embedding_VH, final_norm_H=final_norm_H, head_VH=head_VH
    )


class _Loader:
    """Moves arrays to a device."""

    def __init__(self, device: Device, element_type: torch.dtype) -> None:
        self._device = device
        self._element_type = element_type

    def matrix(self, parts: Sequence[Array]) -> torch.Tensor:
        """Matrices one below the other, rounded to the number format."""
        shape = (sum(len(part) for part in parts), parts[0].shape[1])
        return self._fill(self._device.zeros(shape, self._element_type), parts)

    def vector(self, parts: Sequence[Array | None], sizes: Sequence[int]) -> torch.Tensor:
        """Vectors one after the other in float32; None is zeros."""
        tensor = self._device.zeros((sum(sizes),), torch.float32)
        zeros = (np.zeros(size, np.float32) for size in sizes)
        filled = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        return self._fill(tensor, filled)

    def layer(self, layer: LayerWeights, config: LlamaConfig) -> CudaLayer:
        hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv_bias = [layer.q_bias_P, layer.k_bias_K, layer.v_bias_K]
        return CudaLayer(
            attention_norm_H=self.vector([layer.attention_norm_H], [hidden]),
            qkv_CH=self.matrix([layer.q_PH, layer.k_KH, layer.v_KH]),
            qkv_bias_C=self.vector(qkv_bias, [q_size, kv_size, kv_size]),
            q_norm_D=self.vector([layer.q_norm_D], [head_dim]),
            k_norm_D=self.vector([layer.k_norm_D], [head_dim]),
            output_HP=self.matrix([layer.o_HP]),
            output_bias_H=self.vector([layer.o_bias_H], [hidden]),
            mlp_norm_H=self.vector([layer.mlp_norm_H], [hidden]),
            gate_up_2FH=self.matrix([layer.gate_FH, layer.up_FH]),
            gate_up_bias_2F=self.vector([layer.gate_bias_F, layer.up_bias_F], [inner, inner]),
            down_HF=self.matrix([layer.down_HF]),
            down_bias_H=self.vector([layer.down_bias_H], [hidden]),
        )

    def _fill(self, tensor: torch.Tensor, parts: Sequence[Any]) -> torch.Tensor:
        first = 0
        for part in parts:
            # torch takes no read-only arrays, which mapped files are.
            array = np.require(part, np.float32, ["C", "W"])
            tensor[first : first + len(part)].copy_(torch.from_numpy(array))
            first += len(part)
        return tensor
