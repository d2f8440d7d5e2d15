from __future__ import annotations

from pathlib import Path

from core.engine.engine import Engine, EngineSettings
from core.models.registry import load_config
from core.pipeline.plan import StageSlice
from core.weights.open import open_checkpoint
from services.local.warm import write_smallest_model
from tests.support.models import write_servable


def compile_whole_model(path: Path, *, max_rows: int) -> None:
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint)
    whole = StageSlice(first_layer=0, end_layer=config.num_layers, num_layers=config.num_layers)
    settings = EngineSettings("bf16", num_kv_blocks=4, num_slots=2, max_rows=max_rows)
    Engine(checkpoint, config, whole, settings)
    checkpoint.close()


def cached_functions() -> set[Path]:
    from numba.core import config

    return set(Path(config.CACHE_DIR).rglob("*.nb[ic]"))


def test_kernels_compiled_for_the_smallest_model_serve_another(tmp_path: Path) -> None:
    compile_whole_model(write_smallest_model(tmp_path), max_rows=1)
    before = cached_functions()
    compile_whole_model(write_servable(tmp_path / "other"), max_rows=64)
    assert before
    assert cached_functions() == before
