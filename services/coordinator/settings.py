"""What the operator may set on a coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """Settings of one coordinator process; addresses are `host:port`."""

    listen: str
    stages: tuple[str, ...]  # addresses of the stages, first stage first
    metrics_port: int | None = None  # None: no metrics
    max_sequences: int = 256  # running at a time
    max_waiting: int = 1024  # waiting for admission; one more is refused
    speculation: int = 16  # most guesses of a sequence in a micro-batch; 0: none
    micro_batch_timeout_s: float = 30.0  # a pipeline that returns nothing for so long has hung
    prefix_cache: bool = True  # prompts that begin alike are computed once
    open_timeout_s: float = 600.0  # for all stages to load their weights and open
    log_level: str = "INFO"
    exit_with_parent: bool = False  # stop when standard input ends

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise InvalidInput("stages", ",".join(self.stages), "addresses, first stage first")
        if len(set(self.stages)) != len(self.stages):
            raise InvalidInput("stages", ",".join(self.stages), "a different address each")
        if self.max_sequences < 1:
            raise InvalidInput("max_sequences", self.max_sequences, "at least 1")
        if self.max_waiting < 1:
            raise InvalidInput("max_waiting", self.max_waiting, "at least 1")
        if self.speculation < 0:
            raise InvalidInput("speculation", self.speculation, "0 or more")
        for name in ("micro_batch_timeout_s", "open_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, getattr(self, name), "above 0")
