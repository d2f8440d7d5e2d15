"""Where a model is cut into stages, and with whose weights.

A sequence may go on over any path whose layers have the weights that it began with: where the
model is cut changes nothing in what is computed, to the bit. (Where a wire's codec rounds at the
cut, there is one cut: `WireCodec.refuse_other_cuts`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from core.errors import InvalidInput
from core.pipeline.partitioner import parse_split


class Part(NamedTuple):
    """What a replica holds: neighbouring layers, from `first_layer` on."""

    first_layer: int
    weights: tuple[str, ...]  # names those of each layer

    @property
    def end_layer(self) -> int:
        """One past the last layer."""
        return self.first_layer + len(self.weights)

    @property
    def layers(self) -> tuple[int, int]:
        return self.first_layer, self.end_layer


@dataclass(frozen=True)
class Cut:
    """A whole model in parts, the first layers' first."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        layers = [part.layers for part in self.parts]
        ends = [0, *(end for _, end in layers)]
        if not layers or any(first != end for (first, _), end in zip(layers, ends, strict=False)):
            raise InvalidInput("parts", layers, "layers that join up, from 0 on")

    @cached_property
    def weights(self) -> str:
        """Names the weights of all layers, wherever they are cut."""
        return "\n".join(name for part in self.parts for name in part.weights)

    @property
    def split(self) -> str:
        """As an operator would write it: "0:14,14:30"."""
        return ",".join("{}:{}".format(*part.layers) for part in self.parts)

    def at(self, split: str) -> Cut:
        """The same layers with the same weights, cut elsewhere; raises InvalidInput unless `split`
        covers them all."""
        names = [name for part in self.parts for name in part.weights]
        slices = parse_split(split, num_layers=len(names))
        return Cut(
            tuple(
                Part(one.first_layer, tuple(names[one.first_layer : one.end_layer]))
                for one in slices
            )
        )

    def with_part(self, part: Part) -> Cut | None:
        """The cut with other weights in the place of its own; None where it has no such layers."""
        if all(one.layers != part.layers for one in self.parts):
            return None
        return Cut(tuple(part if one.layers == part.layers else one for one in self.parts))

    def with_first(self, parts: Iterable[Part]) -> Cut:
        """The cut with, in each place, the first of the parts that have its layers."""
        first: dict[tuple[int, int], Part] = {}
        for part in parts:
            first.setdefault(part.layers, part)
        return Cut(tuple(first.get(one.layers, one) for one in self.parts))


def find_cut(parts: Iterable[Part], *, num_layers: int) -> Cut | None:
    """A cut of those of the parts that come first, if they are a whole model."""
    first_at: dict[int, Part] = {}
    for part in parts:
        first_at.setdefault(part.first_layer, part)
    chosen: list[Part] = []
    end_layer = 0
    while end_layer < num_layers:
        if end_layer not in first_at:
            return None
        chosen.append(first_at[end_layer])
        end_layer = chosen[-1].end_layer
    return Cut(tuple(chosen))
