"""How likely a model finds a text, from teacher-forced logits.

Letters: T tokens of the text, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def log_likelihoods(
    chunks: Iterable[npt.NDArray[np.float32]], token_ids_T: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Of every token but the first, in nats, [T - 1]; each right to fp32's rounding (1e-6).

    `chunks` are the text's logits [C, V], in order.
    """
    import torch

    targets_T = torch.from_numpy(token_ids_T[1:].astype(np.int64))
    parts, first = [], 0
    for logits_CV in chunks:
        targets_C = targets_T[first : first + len(logits_CV)]
        first += len(logits_CV)
        rows_CV = torch.from_numpy(logits_CV)[: len(targets_C)]
        parts.append(-torch.nn.functional.cross_entropy(rows_CV, targets_C, reduction="none"))
    assert first == len(token_ids_T)
    return torch.cat(parts).double().numpy()
