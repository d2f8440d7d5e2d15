"""Compiles the kernels before a mesh needs them.

Kernels are compiled for a processor and a number format, not for a model: an engine with
the smallest model there can be compiles all that any engine uses, into the cache that the
stages read, too.
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path

_HIDDEN = _INTERMEDIATE = 32
_VOCABULARY = 32
_CONTEXT = 16


def warm_kernels(number_format: str) -> float:
    """Compiles what is not in the cache yet; returns the seconds that took."""
    started_s = time.monotonic()
    # Imported here: commands that compile nothing do not pay for the compiler.
    from core.engine.engine import Engine, EngineSettings
    from core.models.registry import load_config
    from core.pipeline.plan import StageSlice
    from core.weights.open import open_checkpoint
    from services.common.kernel_cache import note_compiled

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_smallest_model(Path(folder)))
        config = load_config(checkpoint)
        Engine(
            checkpoint,
            config,
            StageSlice(first_layer=0, end_layer=1, num_layers=1),
            EngineSettings(number_format=number_format, num_kv_blocks=1, num_slots=1, max_rows=1),
        )
        checkpoint.close()
    note_compiled(number_format)
    return time.monotonic() - started_s


def write_smallest_model(folder: Path) -> Path:
    """A llama2.c file of one layer and one head, all weights zero."""
    sizes = (_HIDDEN, _INTERMEDIATE, 1, 1, 1, _VOCABULARY, _CONTEXT)
    projections = 4 * _HIDDEN * _HIDDEN + 3 * _HIDDEN * _INTERMEDIATE
    rotary_tables = _CONTEXT * _HIDDEN
    num_floats = _VOCABULARY * _HIDDEN + 3 * _HIDDEN + projections + rotary_tables
    path = folder / "smallest.bin"
    path.write_bytes(struct.pack("<7i", *sizes) + bytes(4 * num_floats))
    return path
