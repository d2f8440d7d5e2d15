"""How much one stage's engine may hold."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput
from core.kernels.arithmetic import NUMBER_FORMATS


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine. Raises InvalidInput where one makes no sense."""

    number_format: str  # of weights, activations and KV cache: "fp32" or "bf16"
    num_kv_blocks: int  # of 16 positions each
    num_slots: int = 256  # most sequences at a time
    max_rows: int = 512  # most rows of a micro-batch
    context_length: int | None = None  # most positions of a sequence; None: the model's own

    def __post_init__(self) -> None:
        if self.number_format not in NUMBER_FORMATS:
            raise InvalidInput("number_format", self.number_format, " or ".join(NUMBER_FORMATS))
        for name in ("num_kv_blocks", "num_slots", "max_rows"):
            if not 1 <= getattr(self, name) <= 1 << 30:
                raise InvalidInput(name, getattr(self, name), "1 to 2^30")
        if self.context_length is not None and self.context_length < 1:
            raise InvalidInput("context_length", self.context_length, "at least 1")
