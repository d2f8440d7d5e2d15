"""Settings of a stage process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidInput
from core.wire.codecs import check_wire

NUMBER_FORMATS = ("fp32", "bf16", "int8", "int4")
DEVICES = ("auto", "cpu", "cuda")
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What one stage holds and where it listens."""

    model: Path  # a GGUF file, a Hugging Face folder, a llama2.c file or a sealed folder
    name: str  # the model's name in the mesh
    first_layer: int
    end_layer: int  # one past the last layer; checked against the model when it is read
    listen: str  # host:port; port 0 takes a free one
    metrics_port: int | None = None  # None: no metrics; 0: a free one
    number_format: str = "bf16"
    device: str = "cpu"  # "cuda", or "auto": a GPU where one can be used
    wire: str = "f32"  # codec of activations between stages; see `core.wire.codecs`
    num_kv_blocks: int = 1024
    max_rows: int = 512  # of a micro-batch
    threads: int = 1  # that compute a micro-batch on a CPU
    threads_alone: int = 1  # one that has the machine to itself, if that is more
    max_sequences: int = 256  # at a time
    offers_shortcuts: bool = True  # sockets beside the streams, for peers on the same host
    slow_down: float = 1.0  # computing takes so many times as long; to try what slow nodes do
    # Of a sealed model: whose signature counts, and what opens this stage's layers.
    sealer: Path | None = None
    identity_key: Path | None = None
    manifest: Path | None = None  # digests of the model; other bytes are not loaded
    rehash_minutes: float = 10.0  # weights in memory are hashed again so often; 0: never
    slow_down_file: Path | None = None  # while it is there, what it says instead; inf: it hangs
    exit_with_parent: bool = False  # stop when standard input ends
    certs: Path | None = None  # folder of this stage's identity; None: everything in the clear
    insecure: bool = False  # listens beyond loopback even so

    def __post_init__(self) -> None:
        if self.number_format not in NUMBER_FORMATS:
            raise InvalidInput("dtype", self.number_format, " or ".join(NUMBER_FORMATS))
        check_wire(self.wire, number_format=self.number_format)
        if self.device not in DEVICES:
            raise InvalidInput("device", self.device, " or ".join(DEVICES))
        if (self.sealer is None) != (self.identity_key is None):
            wanted = "given with --identity-key, or neither of them"
            raise InvalidInput("sealer", str(self.sealer or ""), wanted)
        if self.sealer is not None and self.manifest is not None:
            wanted = "given for models that are not sealed: a seal covers every byte"
            raise InvalidInput("manifest", str(self.manifest), wanted)
        if not self.name:
            raise InvalidInput("name", self.name, "a name that is not empty")
        if not 0 <= self.first_layer < self.end_layer:
            layers = f"{self.first_layer}:{self.end_layer}"
            raise InvalidInput("layers", layers, "FIRST:END with 0 <= FIRST < END")
        if not 1.0 <= self.slow_down < float("inf"):
            raise InvalidInput("slow_down", self.slow_down, "at least 1")
        if not 0 <= self.rehash_minutes < float("inf"):
            raise InvalidInput("rehash_minutes", self.rehash_minutes, "0 (never) or more")
        for name in ("threads", "threads_alone"):
            if not 1 <= getattr(self, name) <= MOST_THREADS:
                raise InvalidInput(name, getattr(self, name), f"1 to {MOST_THREADS}")
        for name in ("num_kv_blocks", "max_rows", "max_sequences"):
            if getattr(self, name) < 1:
                raise InvalidInput(name, getattr(self, name), "at least 1")


def parse_layers(text: str) -> tuple[int, int]:
    """Parses "0:15" into (0, 15): first layer, and one past the last."""
    first, separator, end = text.partition(":")
    if not (separator and first.isdecimal() and end.isdecimal()):
        raise InvalidInput("layers", text, "FIRST:END, such as 0:15")
    return int(first), int(end)
