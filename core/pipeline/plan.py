"""Which layers each stage holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSlice:
    """A run of layers: `first_layer` up to, not including, `end_layer`.

    The first stage embeds tokens; the last has the final norm, the head and sampling.
    """

    first_layer: int
    end_layer: int
    num_layers: int  # of the whole model

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.end_layer == self.num_layers
