"""What the gateway makes of what the coordinator tells it."""

from __future__ import annotations

import pytest
from penstock.v1 import coordinator_pb2, generation_pb2

from core.errors import Unavailable
from services.common.health import HealthService
from services.gateway.mesh_view import MeshView

STARTING = coordinator_pb2.MeshState()
SERVING = coordinator_pb2.MeshState(
    model=generation_pb2.Model(name="tiny", vocab_size=300, ready=True), stages_ready=[True]
)


@pytest.fixture
def view() -> MeshView:
    return MeshView(HealthService(), vocab_size=300, has_chat_template=False)


async def test_a_mesh_that_has_not_told_its_model_is_still_starting(view: MeshView) -> None:
    await view.update(STARTING)
    assert view.models == []
    with pytest.raises(Unavailable, match="still starting") as caught:
        view.model("")
    assert caught.value.retry_after_s is not None


async def test_a_coordinator_that_begins_anew_does_not_make_the_model_unknown(
    view: MeshView,
) -> None:
    await view.update(SERVING)
    await view.update(STARTING)
    assert view.model("tiny").vocab_size == 300
    assert not view.is_ready
