"""One real mesh for all tests here: the default model, two stages, ports of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.local.run_folder import find_process
from tests.support.client import Client, connect
from tests.support.local_mesh import START_TIMEOUT_S, LocalMesh

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test is first waits for the mesh, and maybe for the model's download."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """A running mesh. Afterwards none of its processes may be left."""
    mesh = LocalMesh(runtime=tmp_path_factory.mktemp("mesh"), environment={})
    # Small enough that tests can fill it: about 4,000 tokens.
    mesh.start("--kv-memory", "112MiB")
    processes = mesh.record.processes
    yield mesh
    mesh.stop()
    assert not any(find_process(process) for process in processes)


@pytest.fixture(scope="session")
def shared_client(mesh: LocalMesh) -> Iterator[Client]:
    record = mesh.record
    with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
        yield client


@pytest.fixture
def client(shared_client: Client) -> Iterator[Client]:
    """A client of the mesh. After each test the mesh serves, and holds nothing any more."""
    yield shared_client
    shared_client.wait_until_idle()
    answer = shared_client.generate(prompt="One, two,", sampling={"max_tokens": 2})
    assert len(answer.token_ids) == 2
