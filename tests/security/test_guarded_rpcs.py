"""RPCs of a mesh with certificates and keys, called by those who may not, for some seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.rpc.guarded import CALLERS, GuardedServers, guarded
from tests.fuzz.rpc.trial import fuzz_rpc
from tests.support.local_mesh import START_TIMEOUT_S

EXECUTIONS = 20

pytestmark = pytest.mark.timeout(START_TIMEOUT_S)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServers]:
    with guarded(tmp_path_factory.mktemp("guarded")) as started:
        yield started


@pytest.mark.parametrize("who", CALLERS)
def test_no_caller_gets_further_than_they_may(servers: GuardedServers, who: str) -> None:
    servers.caller = CALLERS[who]
    for name in servers.caller.methods:
        result = fuzz_rpc(servers, name, executions=EXECUTIONS, seed=1)
        assert [finding.what for finding in result.findings] == []
        assert result.executions == EXECUTIONS
