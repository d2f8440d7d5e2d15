"""Loads a stage's slice of a model, and says what it holds."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration
from penstock.v1 import stage_pb2

from core.errors import InvalidInput
from core.weights.checkpoint import Checkpoint
from core.weights.manifest import open_checked, read_manifest
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import read_seal_keys
from core.wire.codecs import codec_named
from services.common.logs import COMPILING
from services.stage.job import StageEngine
from services.stage.settings import StageSettings
from services.stage.slowed_engine import slowed
from services.stage.weight_watch import WeightWatch

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """An engine, and its manifest as the coordinator gets it."""

    engine: StageEngine
    manifest: stage_pb2.StageReady
    codec: str
    watch: WeightWatch = field(default_factory=lambda: WeightWatch({}))

    @property
    def is_first(self) -> bool:
        return self.manifest.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.manifest.end_layer == self.manifest.num_layers

    @property
    def load_duration_s(self) -> float:
        return self.manifest.load_duration.ToNanoseconds() / 1e9


def load_model(settings: StageSettings) -> LoadedModel:
    """Reads the layers of this stage and prepares its kernels; takes seconds.

    Raises CorruptWeights, NotFound, InvalidInput (layers that the model has not), KeyRefused
    (layers that this stage may not open) or Exhausted (too little memory).
    """
    started = time.perf_counter_ns()
    # Imported here, by the compute thread: compiled kernels load while the port is open already.
    from core.engine.cpu_backend import CpuBackend
    from core.engine.devices import choose_backend
    from core.engine.engine import Engine, EngineSettings
    from core.models.llama.weight_names import layer_tensors
    from core.models.registry import load_config
    from core.pipeline.plan import StageSlice
    from services.common.kernel_cache import kernels_are_compiled, note_compiled

    checkpoint = _open(settings)
    config = load_config(checkpoint)
    layers = f"{settings.first_layer}:{settings.end_layer}"
    if settings.end_layer > config.num_layers:
        raise InvalidInput("layers", layers, f"within 0:{config.num_layers}, all there are")
    stage_slice = StageSlice(
        first_layer=settings.first_layer,
        end_layer=settings.end_layer,
        num_layers=config.num_layers,
    )
    make_backend = choose_backend(settings.device, number_format=settings.number_format)
    # Those of a GPU are compiled at every start.
    keeps_kernels = make_backend is CpuBackend
    if keeps_kernels and not kernels_are_compiled(settings.number_format):
        _LOG.info(COMPILING, extra={"number_format": settings.number_format})
    engine = Engine(
        checkpoint,
        config,
        stage_slice,
        EngineSettings(
            number_format=settings.number_format,
            num_kv_blocks=settings.num_kv_blocks,
            num_slots=settings.max_sequences,
            max_rows=settings.max_rows,
            num_threads=settings.threads,
            num_threads_alone=settings.threads_alone,
            wire=settings.wire,
            keeps_log=not stage_slice.is_last,
        ),
        make_backend=make_backend,
    )
    if keeps_kernels:
        note_compiled(settings.number_format)
    digests = [
        checkpoint.digest_of(layer_tensors(checkpoint, config, layer))
        for layer in range(settings.first_layer, settings.end_layer)
    ]
    manifest = stage_pb2.StageReady(
        model=settings.name,
        first_layer=stage_slice.first_layer,
        end_layer=stage_slice.end_layer,
        num_layers=stage_slice.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        # Longer sequences than all blocks together hold are refused, whatever the model allows.
        context_length=min(config.context_length, settings.num_kv_blocks * engine.kv_block_size),
        number_format=settings.number_format,
        codec=codec_named(engine.codec).number,
        kv_block_size=engine.kv_block_size,
        num_kv_blocks=settings.num_kv_blocks,
        max_rows=settings.max_rows,
        weights_bytes=engine.weights_bytes,
        bytes_read=checkpoint.bytes_read,
        numerics_fingerprint=engine.fingerprint,
        load_duration=_duration(time.perf_counter_ns() - started),
        eos_token_ids=config.eos_token_ids,
        model_digest=_digest(config),
        weights_digest=_digest(digests, layers, engine.fingerprint, config),
        layer_digests=digests,
    )
    if make_backend is CpuBackend:  # threads are none of a GPU's business
        manifest.threads = settings.threads
        manifest.threads_alone = max(settings.threads, settings.threads_alone)
    return LoadedModel(
        engine=slowed(engine, by=settings.slow_down, file=settings.slow_down_file),
        manifest=manifest,
        codec=engine.codec,
        watch=WeightWatch(engine.weight_arrays, interval_s=60 * settings.rehash_minutes),
    )


def _open(settings: StageSettings) -> Checkpoint:
    if settings.manifest is not None:
        return open_checked(settings.model, read_manifest(settings.manifest))
    if settings.sealer is None:
        return open_checkpoint(settings.model)
    keys = read_seal_keys(settings.sealer, settings.identity_key)
    return open_checkpoint(settings.model, keys=keys)


def _digest(*facts: object) -> str:
    """SHA-256 (hex) of what the facts look like."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _duration(nanoseconds: int) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(nanoseconds)
    return duration
