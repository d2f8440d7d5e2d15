"""Every RPC, for some seconds, as `make security` tries it for long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.rpc.methods import METHODS
from tests.fuzz.rpc.servers import Servers, serving
from tests.fuzz.rpc.trial import fuzz_rpc
from tests.support.local_mesh import START_TIMEOUT_S

EXECUTIONS = 45

pytestmark = pytest.mark.timeout(START_TIMEOUT_S)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with serving(tmp_path_factory.mktemp("fuzz")) as started:
        yield started


@pytest.mark.parametrize("name", METHODS)
def test_nothing_that_is_sent_breaks_a_server(servers: Servers, name: str) -> None:
    result = fuzz_rpc(servers, name, executions=EXECUTIONS, seed=1)
    assert [finding.what for finding in result.findings] == []
    assert result.executions == EXECUTIONS
