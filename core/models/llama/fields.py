"""Reads typed, bounded values from the metadata of a checkpoint, which is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from core.errors import CorruptWeights
from core.weights.checkpoint import Checkpoint

# Far above any model, far below what would make us allocate absurd amounts.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12


class Fields:
    """The metadata of `checkpoint`, or a mapping inside it; every error is CorruptWeights and
    names the file, the field and the value."""

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, Any] | None = None) -> None:
        self.checkpoint = checkpoint
        self.values = checkpoint.metadata if values is None else values

    def error(self, message: str) -> CorruptWeights:
        return CorruptWeights(f"{self.checkpoint.path}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value, or `default` where it is absent or null.

        Numeric arrays of a GGUF file (sizes that differ by layer) are refused.
        """
        value = self.values.get(key)
        if isinstance(value, np.ndarray):
            raise self.error(f"{key} is an array; one value is expected")
        return default if value is None else value

    def integer(self, key: str, *, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Returns an integer from 1 to `most`."""
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(f"{key} is {_shown(value)}; an integer from 1 to {most} is supported")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """Returns a positive, finite float."""
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(f"{key} is {_shown(value)}; a positive number is expected")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {_shown(value)}; true or false is expected")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns the token ids of a field that holds one, a list of them, or nothing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise self.error(f"{key} is {_shown(value)}; token ids are expected")
        return tuple(ids)

    def require_default(self, key: str, *allowed: object) -> None:
        """Refuses a field whose value would change the arithmetic in a way we do not have."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.error(f"{key} is {_shown(value)}, which is not supported")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unique(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """Joins token ids, each once, in order of first appearance."""
    return tuple(dict.fromkeys(token_id for group in groups for token_id in group))
