"""What the gateway knows of the mesh, and the health it tells because of that."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from penstock.v1 import coordinator_pb2, generation_pb2

from core.errors import NotFound, Unavailable, shown
from services.common.health import HealthService

_LOG = logging.getLogger(__name__)
_STARTING_RETRY_S = 2.0


class MeshView:
    """The last state of the mesh that the coordinator told.

    The model stays known when the coordinator goes; it is only not ready then.
    """

    def __init__(self, health: HealthService, *, vocab_size: int, has_chat_template: bool) -> None:
        """`vocab_size` and `has_chat_template` are those of the gateway's tokenizer."""
        self._health = health
        self._vocab_size = vocab_size
        self._has_chat_template = has_chat_template
        self._model: generation_pb2.Model | None = None
        self._health_names: set[str] = {""}

    async def update(self, mesh: coordinator_pb2.MeshState | None) -> None:
        """Takes a new state; None: the coordinator is away. One without a model's name: no stage
        has told it yet what it holds."""
        if mesh is not None and mesh.model.name:
            self._model = self._own(mesh.model)
        elif self._model is not None:
            self._model.ready = False
        stages_ready = mesh.stages_ready if mesh is not None else ()
        await self._tell_health(stages_ready)

    @property
    def models(self) -> list[generation_pb2.Model]:
        """The models known, ready or not."""
        return [self._model] if self._model is not None else []

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        return self._model is not None and self._model.ready

    def model(self, name: str) -> generation_pb2.Model:
        """Returns the model of that name; an empty name means the only one.

        Raises NotFound, or Unavailable while nobody has told yet.
        """
        if self._model is None:
            raise Unavailable("the mesh is still starting", retry_after_s=_STARTING_RETRY_S)
        if name not in ("", self._model.name):
            message = f"there is no model {shown(name)}; served: {self._model.name!r}"
            raise NotFound(message, field="model")
        return self._model

    def _own(self, told: generation_pb2.Model) -> generation_pb2.Model:
        model = generation_pb2.Model()
        model.CopyFrom(told)
        model.has_chat_template = self._has_chat_template
        # Models pad their embedding beyond the tokenizer's ids, never the other way.
        if model.ready and model.vocab_size < self._vocab_size:
            facts = {"tokenizer": self._vocab_size, "model": model.vocab_size}
            _LOG.error("the tokenizer is not this model's", extra=facts)
            model.ready = False
        return model

    async def _tell_health(self, stages_ready: Iterable[bool]) -> None:
        serving = {"": self.is_ready}
        if self._model is not None:
            name = self._model.name
            serving[name] = self.is_ready
            serving |= {f"{name}/stage/{i}": ready for i, ready in enumerate(stages_ready)}
        self._health_names |= serving.keys()
        for name in sorted(self._health_names):
            await self._health.set(name, serving=serving.get(name, False))
