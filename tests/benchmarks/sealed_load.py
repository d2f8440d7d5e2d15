"""`python -m tests.benchmarks.sealed_load`: what a stage takes to load plain, checked and sealed.

The same stage (the first half of the layers, PENSTOCK_MODEL, PENSTOCK_DTYPE) is loaded in turns
from the plain file, with its manifest, and from a sealed folder; files are in the page cache.
"Read" is reading and decoding all its tensors, without packing them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from core.models.llama.weight_names import read_embedding, read_layer
from core.models.registry import load_config
from core.weights.manifest import open_checked, read_manifest
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import read_seal_keys, write_identity
from services.local.catalogue import DEFAULT_MODEL
from services.local.fetch import resolve_model
from services.local.manifests import write_manifest_of
from services.local.prepare import read_model
from services.local.sealing import SealWishes, seal_model
from services.stage.model import load_model
from services.stage.settings import StageSettings

ROUNDS = int(os.environ.get("PENSTOCK_ROUNDS") or 5)


class Times(NamedTuple):
    """Seconds: by the clock, and of this process's CPU time."""

    wall: float
    cpu: float


class Way(NamedTuple):
    """One way to get the same weights."""

    name: str
    open: Callable[[], Any]
    settings: dict[str, Any]


def main() -> None:
    """Prints a table of medians."""
    model = resolve_model(os.environ.get("PENSTOCK_MODEL") or DEFAULT_MODEL)
    facts = read_model(model, dtype=os.environ.get("PENSTOCK_DTYPE") or "auto")
    end_layer = facts.config.num_layers // 2
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(model, Path(folder))
        for what, measure in (
            ("read", lambda way: _read(way, end_layer)),
            ("load", lambda way: _load(way, end_layer, facts.number_format)),
        ):
            _measure_in_turns(f"{what} layers 0:{end_layer}, {facts.number_format}", ways, measure)


def _ways(model: Path, folder: Path) -> list[Way]:
    keys, sealed, manifest = folder / "keys", folder / "sealed", folder / "manifest.json"
    for name in ("owner", "stage-0", "stage-1"):
        write_identity(keys, name)
    started_s = time.perf_counter()
    seal_model(model, sealed, SealWishes(keys=keys, holders={}), name="model", version="1")
    seal_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    write_manifest_of(model, manifest)
    print(f"sealing: {seal_s:.2f} s; manifest: {time.perf_counter() - started_s:.2f} s")
    sealer, identity = keys / "owner.pub", keys / "stage-0.key"
    return [
        Way("plain", lambda: open_checkpoint(model), {"model": model}),
        Way(
            "manifest",
            lambda: open_checked(model, read_manifest(manifest)),
            {"model": model, "manifest": manifest},
        ),
        Way(
            "sealed",
            lambda: open_checkpoint(sealed, keys=read_seal_keys(sealer, identity)),
            {"model": sealed, "sealer": sealer, "identity_key": identity},
        ),
    ]


def _measure_in_turns(title: str, ways: list[Way], measure: Callable[[Way], Times]) -> None:
    for way in ways:
        measure(way)  # compiles, and fills the page cache
    times: dict[str, list[Times]] = {way.name: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            times[way.name].append(measure(way))
    print(f"\n{title}: medians of {ROUNDS} rounds")
    plain = _median(times["plain"])
    for way in ways:
        found = _median(times[way.name])
        print(
            f"  {way.name:9} {found.wall:6.3f} s ({found.wall / plain.wall:.2f} x), "
            f"CPU {found.cpu:6.3f} s ({found.cpu / plain.cpu:.2f} x)"
        )


def _median(times: list[Times]) -> Times:
    return Times(
        statistics.median(one.wall for one in times), statistics.median(one.cpu for one in times)
    )


def _timed(work: Callable[[], object]) -> Times:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _read(way: Way, end_layer: int) -> Times:
    def read() -> None:
        with closing(way.open()) as checkpoint:
            config = load_config(checkpoint)
            read_embedding(checkpoint, config)
            for layer in range(end_layer):
                read_layer(checkpoint, config, layer)

    return _timed(read)


def _load(way: Way, end_layer: int, number_format: str) -> Times:
    settings = StageSettings(
        name="model",
        first_layer=0,
        end_layer=end_layer,
        listen="",
        number_format=number_format,
        num_kv_blocks=16,
        rehash_minutes=0,
        **way.settings,
    )
    return _timed(lambda: load_model(settings))


if __name__ == "__main__":
    main()
