"""How much one stage's engine may hold."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput
from core.kernels.arithmetic import NUMBER_FORMATS
from core.wire.codecs import check_wire

MOST_THREADS = 1024


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine. Raises InvalidInput where one makes no sense."""

    number_format: (
        str  # of weights and KV cache: "fp32", "bf16", "int8", or "int4" with the cache of int8
    )
    num_kv_blocks: int  # of 16 positions each
    num_slots: int = 256  # most sequences at a time
    max_rows: int = 512  # most rows of a micro-batch
    context_length: int | None = None  # most positions of a sequence; None: the model's own
    # Codec of activations between stages. "bf16" (not with fp32 weights) halves their bytes, and
    # rounds the residual stream after every layer, so that a cut still changes nothing. "int8"
    # nearly halves them again, and rounds at the cut alone: so other cuts compute other bits. See
    # docs/decisions.md for what they cost.
    wire: str = "f32"
    # Threads that compute a micro-batch on a CPU; and one that has the machine to itself, if more.
    num_threads: int = 1
    num_threads_alone: int = 1
    # Keeps the rows that are sent, so that they can be sent again. A last stage sends none.
    keeps_log: bool = False

    def __post_init__(self) -> None:
        if self.number_format not in NUMBER_FORMATS:
            raise InvalidInput("number_format", self.number_format, " or ".join(NUMBER_FORMATS))
        check_wire(self.wire, number_format=self.number_format)
        for name in ("num_kv_blocks", "num_slots", "max_rows"):
            if not 1 <= getattr(self, name) <= 1 << 30:
                raise InvalidInput(name, getattr(self, name), "1 to 2^30")
        for name in ("num_threads", "num_threads_alone"):
            if not 1 <= getattr(self, name) <= MOST_THREADS:
                raise InvalidInput(name, getattr(self, name), f"1 to {MOST_THREADS}")
        if self.context_length is not None and self.context_length < 1:
            raise InvalidInput("context_length", self.context_length, "at least 1")
