"""Health, reflection, tokens and models: what clients ask besides generating."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from penstock.v1 import generation_pb2 as pb

from tests.services.gateway.conftest import NOT_SERVING, SERVING, Setup


async def status_of(setup: Setup, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(setup.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


async def test_health_follows_the_mesh(setup: Setup) -> None:
    names = ("", "tiny", "tiny/stage/0", "tiny/stage/1")
    assert [await status_of(setup, name) for name in names] == [SERVING] * 4
    setup.coordinator.mesh.model.ready = False
    setup.coordinator.mesh.stages_ready[1] = False
    setup.coordinator.tell_mesh()
    await setup.wait_for_health(NOT_SERVING, name="tiny/stage/1")
    assert [await status_of(setup, name) for name in names] == [
        *(NOT_SERVING, NOT_SERVING, SERVING, NOT_SERVING)
    ]


async def test_health_is_down_while_the_coordinator_is_away(setup: Setup) -> None:
    await setup.coordinator.stop()
    await setup.wait_for_health(NOT_SERVING, name="tiny/stage/1")
    for name in ("", "tiny", "tiny/stage/0"):
        assert await status_of(setup, name) == NOT_SERVING


@pytest.mark.parametrize("name", ["gpt-7", "tiny/stage/2", "penstock.v1.GenerationService"])
async def test_health_of_an_unknown_name_is_not_found(setup: Setup, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status_of(setup, name)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_smaller_than_the_tokenizer_is_not_served(setup: Setup) -> None:
    setup.coordinator.mesh.model.vocab_size = setup.tokenizer.vocab_size - 1
    setup.coordinator.tell_mesh()
    await setup.wait_for_health(NOT_SERVING)


async def test_reflection_lists_and_describes_the_services(setup: Setup) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(setup.channel)
    symbol = "inference.GRPCInferenceService"
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
    ]
    call = stub.ServerReflectionInfo(iter(requests), timeout=30)
    listed, described = [response async for response in call]
    assert {service.name for service in listed.list_services_response.service} == {
        "penstock.v1.GenerationService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert described.file_descriptor_response.file_descriptor_proto


async def test_models_are_listed_with_what_the_tokenizer_adds(setup: Setup) -> None:
    (model,) = (await setup.generation.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.context_length, model.num_stages) == ("tiny", 200, 2)
    assert (model.number_format, model.vocab_size) == ("bf16", 300)
    assert model.has_chat_template
    assert model.ready


async def test_tokenize_and_detokenize_are_inverse(setup: Setup) -> None:
    text = "hello 日本 <|end|>"
    tokenized = await setup.generation.Tokenize(pb.TokenizeRequest(prompt=text))
    assert list(tokenized.token_ids) == setup.tokenizer.encode(text)
    request = pb.DetokenizeRequest(model="tiny", token_ids=tokenized.token_ids)
    assert (await setup.generation.Detokenize(request)).text == text
    request.skip_special_tokens = True
    assert (await setup.generation.Detokenize(request)).text == "hello 日本 "


async def test_messages_are_tokenized_as_generate_would(setup: Setup) -> None:
    messages = [pb.ChatMessage(role="user", content="hello")]
    tokenized = await setup.generation.Tokenize(pb.TokenizeRequest(messages=messages))
    request = pb.GenerateRequest(messages=messages)
    async for _ in setup.generation.Generate(request, timeout=30):
        pass
    assert list(tokenized.token_ids) == list(setup.coordinator.submissions[0].token_ids)
