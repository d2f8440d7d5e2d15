"""A mesh whose stages say less to each other: int8 on the wire."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.end_to_end.test_failover import Running, start
from tests.support.local_mesh import LocalMesh
from tests.support.models import TinyModel, write_servable


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two stages, each alone."""
    folder = tmp_path_factory.mktemp("wire")
    model = write_servable(folder / "tiny", TinyModel())
    mesh = LocalMesh(runtime=folder, environment={})
    yield from start(mesh, "--model", str(model), "--dtype", "bf16", "--wire", "int8")


@pytest.mark.parametrize("name", ["stage-0", "stage-1"])
def test_answers_are_the_same_after_a_stage_has_died(running: Running, name: str) -> None:
    before = running.client.mesh().positions_restored
    running.assert_that_nothing_changes(lambda: running.signal(name, signal.SIGKILL))
    assert running.client.mesh().positions_restored > before


def test_its_layers_cannot_be_moved_and_the_wire_is_shown(running: Running) -> None:
    split = running.client.mesh().split
    done = running.mesh.run("repartition", "--split", "0:1,1:4")
    assert done.returncode != 0
    assert "rounded to int8 where the model is cut" in done.stderr
    assert running.client.mesh().split == split
    running.until_all_are_ready()
    assert "int8 on the wire" in running.mesh.run("status").stdout
