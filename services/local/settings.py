"""What a local mesh can be told."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import InvalidInput
from core.wire.codecs import codec_named
from services.local.catalogue import DEFAULT_MODEL
from services.local.number_format import NUMBER_FORMATS

DEVICES = ("auto", "cpu", "cuda")
MOST_THREADS = 1024


def default_keys_folder() -> Path:
    """$XDG_CONFIG_HOME/penstock/seal-keys, or ~/.config/penstock/seal-keys."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "penstock" / "seal-keys"


_UNITS = {"": 1}
_UNITS |= {letter: 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("kmgt", start=1)}


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Settings of a local mesh; field names are the options of `penstock mesh`."""

    # A name of the catalogue, a file, a folder or a hub id.
    model: str = DEFAULT_MODEL
    stages: int = 2
    # Processes of each stage that share its sequences: one number for all stages, or one of each.
    replicas: tuple[int, ...] = (1,)
    # Processes of each stage that wait until one of these fails; likewise.
    spares: tuple[int, ...] = (0,)
    # One coordinator serves; the others wait until it is lost.
    coordinators: int = 1
    # Times as long as they need that stages take to compute, by stage: to try what slow nodes do.
    slow_down: Mapping[int, float] = field(default_factory=dict)
    # Of weights, activations and KV cache; "auto": by the model's file, see `number_format`.
    dtype: str = "auto"
    # Where stages compute: "cpu", "cuda", or "auto": a GPU where one can be used.
    device: str = "cpu"
    # Codec of activations between stages: see `core.wire.codecs`.
    wire: str = "f32"
    # Layers of each stage, "0:14,14:30"; None: balanced by estimated time.
    split: str | None = None
    # Folder with the keys of sealed models.
    seal_keys: Path = field(default_factory=default_keys_folder)
    # Digests of the model's bytes, for stages to check; None: those of the catalogue, if any.
    manifest: Path | None = None
    # How often stages hash their weights in memory again; 0: never.
    rehash_minutes: float = 10.0
    # KV cache of all stages together; None: a share of the memory that is free.
    kv_memory_bytes: int | None = None
    # Whether prompts that begin alike are computed once, as far as they do.
    prefix_cache: bool = True
    # Whether requests need an API key.
    require_keys: bool = False
    # Where the gateway listens; 0: any free port.
    grpc_port: int = 8001
    # Of the gateway's metrics, the coordinator's and the stages' follow; 0: any free ports.
    metrics_port: int = 8002
    # Most sequences that are computed at a time.
    max_sequences: int = 256
    # Most tokens of a sequence that are guessed at a time; 0: none.
    speculation: int = 16
    # Most rows (tokens) in a micro-batch.
    max_rows: int = 512
    # Threads of a stage that compute a micro-batch; None: as many as keep all cores busy.
    threads: int | None = None
    # Whether what stages on this machine say to each other may go beside gRPC.
    shortcuts: bool = True
    # Folder of the identities with which the processes know each other; None: all in the clear.
    certs: Path | None = None
    # Whether they are made there first, in place of those there may be.
    makes_certs: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *NUMBER_FORMATS):
            raise InvalidInput("dtype", self.dtype, " or ".join(("auto", *NUMBER_FORMATS)))
        codec_named(self.wire)
        if self.device not in DEVICES:
            raise InvalidInput("device", self.device, " or ".join(DEVICES))
        if self.speculation < 0:
            raise InvalidInput("speculation", self.speculation, "0 or more")
        if not 0 <= self.rehash_minutes < math.inf:
            raise InvalidInput("rehash_minutes", self.rehash_minutes, "0 (never) or more")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise InvalidInput("threads", self.threads, f"1 to {MOST_THREADS}")
        if self.stages < 1:
            raise InvalidInput("stages", self.stages, "1 to the model's number of layers")
        if self.coordinators < 1:
            raise InvalidInput("coordinators", self.coordinators, "at least 1")
        for stage_index, factor in self.slow_down.items():
            if stage_index >= self.num_stages or not 1.0 <= factor < math.inf:
                allowed = f"a stage below {self.num_stages}, and at least 1"
                raise InvalidInput("slow", f"{stage_index}={factor:g}", allowed)
        self._check_counts("replicas", self.replicas, least=1)
        self._check_counts("spares", self.spares, least=0)

    def _check_counts(self, name: str, counts: tuple[int, ...], *, least: int) -> None:
        if len(counts) not in (1, self.num_stages) or min(counts, default=-1) < least:
            text = ",".join(map(str, counts))
            raise InvalidInput(
                name, text, f"{least} or more for all stages, or {self.num_stages} such numbers"
            )

    def replicas_of(self, stage_index: int) -> int:
        """How many processes the stage has, beside its spares."""
        return self.replicas[stage_index % len(self.replicas)]

    def processes_of(self, stage_index: int) -> int:
        """How many processes the stage has, spares among them."""
        return self.replicas_of(stage_index) + self.spares[stage_index % len(self.spares)]

    @property
    def num_stages(self) -> int:
        """As many as the split names, where there is one."""
        return self.stages if self.split is None else self.split.count(",") + 1


def parse_counts(field: str, text: str) -> tuple[int, ...]:
    """Reads "2" or "1,2"; raises InvalidInput, naming the option `field`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidInput(field, text, "a number for all stages such as 2, or a list such as 1,2")
    return tuple(map(int, parts))


def parse_factors(field: str, text: str) -> dict[int, float]:
    """Reads "1=2.0" or "0=1.5,1=2", stage by stage; raises InvalidInput, naming the option."""
    parts = [re.fullmatch(r"\s*(\d+)=(\d+(?:\.\d+)?)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise InvalidInput(field, text, "STAGE=FACTOR, such as 1=2.0")
    return {int(part[1]): float(part[2]) for part in parts if part is not None}


def parse_bytes(field: str, text: str) -> int:
    """Reads "2GiB", "512M" or "1000000"; raises InvalidInput, naming the option `field`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise InvalidInput(field, text, "a number of bytes such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])
