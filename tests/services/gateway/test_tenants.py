"""Tenants see nothing of each other, and take the shares of their keys."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from services.common.keys import KeyLimits, as_metadata
from tests.services.gateway.conftest import (
    KeyedSetup,
    Setup,
    detail,
    read_all,
    refusal_of,
)
from tests.services.gateway.test_inference import bool_tensor, infer_request, outputs_of
from tests.support.fake_coordinator import end, tokens

PRIORITY = "penstock-priority"


async def test_the_tenant_is_the_keys_whatever_is_claimed(keyed: KeyedSetup) -> None:
    key = keyed.make_key(tenant="acme")
    await read_all(keyed.generate(key, ("penstock-tenant", "rich"), (PRIORITY, "-5")))
    submission = keyed.setup.coordinator.submissions[0]
    assert (submission.tenant, submission.priority) == ("acme", -5)


async def test_a_priority_above_the_keys_is_refused(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_priority=3))
    await read_all(keyed.generate(key, (PRIORITY, "3")))
    error = await refusal_of(keyed.generate(key, (PRIORITY, "4")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
    assert violation.field == PRIORITY
    assert "'4'; allowed: -100 to 3" in violation.description


async def test_a_key_of_a_low_class_asks_for_it_by_default(keyed: KeyedSetup) -> None:
    await read_all(keyed.generate(keyed.make_key(limits=KeyLimits(max_priority=-7))))
    assert keyed.setup.coordinator.submissions[0].priority == -7


async def test_salts_part_tenants_and_unite_the_keys_of_one(keyed: KeyedSetup) -> None:
    keys = [keyed.make_key(tenant=tenant) for tenant in ("a", "a", "b")]
    for key in keys:
        await read_all(keyed.generate(key))
    first, second, other = (one.cache_salt for one in keyed.setup.coordinator.submissions)
    assert first == second != other
    assert "" not in (first, other)


async def test_without_keys_there_is_no_salt(setup: Setup) -> None:
    await setup.inference.ModelInfer(infer_request("a"), timeout=30)
    assert setup.coordinator.submissions[0].cache_salt == ""


@pytest.mark.parametrize("leaves", ["cancels", "ends"])
async def test_the_same_id_of_another_tenant_cancels_and_shows_nothing(
    keyed: KeyedSetup, leaves: str
) -> None:
    coordinator = keyed.setup.coordinator
    coordinator.script = lambda _: [tokens(65)]
    open_stream = keyed.setup.inference.ModelStreamInfer
    ours, theirs = (
        open_stream(timeout=30, metadata=as_metadata(keyed.make_key(tenant=tenant)))
        for tenant in ("a", "b")
    )
    for stream, prompt in ((ours, "ours"), (theirs, "theirs")):
        await stream.write(infer_request(prompt, bool_tensor("stream", True), id="7"))
        assert _text(await stream.read()).startswith(prompt)
    mine, other = (one.request_id for one in coordinator.submissions)
    assert mine != other
    if leaves == "cancels":
        theirs.cancel()
        assert await asyncio.wait_for(coordinator.cancelled.get(), 30) == other
    else:
        coordinator.send(other, end("LENGTH", 66))
        assert _text(await theirs.read()) == keyed.setup.tokenizer.decode([66])
    coordinator.send(mine, end("LENGTH", 67))
    answer = await ours.read()
    assert answer.infer_response.id == "7"
    assert _text(answer) == keyed.setup.tokenizer.decode([67])
    assert coordinator.cancelled.empty()
    ours.cancel()
    theirs.cancel()


def _text(answer: Any) -> str:
    return str(outputs_of(answer.infer_response)["text_output"])
