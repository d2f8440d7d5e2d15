"""inference.GRPCInferenceService: the Open Inference Protocol in front of the text model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from oip import grpc_service_pb2 as oip
from oip import grpc_service_pb2_grpc as oip_grpc
from penstock.v1 import generation_pb2

from core.errors import NotFound, PenstockError, shown
from services.common.telemetry import callers_context
from services.gateway import inference_tensors as tensors
from services.gateway.caller import current_caller
from services.gateway.generation import TextGenerator
from services.gateway.request_stream import answer_beside_each_other

# Requests of one stream that are worked on at a time.
MAX_REQUESTS_A_STREAM = 64
_VERSION = "1"
_EMPTY_FINAL = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"


class InferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """Serves grpc_service.proto; errors become statuses in the server's interceptor."""

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator

    async def ServerLive(
        self, request: oip.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: oip.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=self._generator.mesh.is_ready)

    async def ModelReady(
        self, request: oip.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> oip.ModelReadyResponse:
        caller = current_caller()
        caller.check_model(request.name)
        known = any(model.name == request.name for model in self._generator.models(caller))
        ready = known and request.version in ("", _VERSION) and self._generator.mesh.is_ready
        return oip.ModelReadyResponse(ready=ready)

    async def ServerMetadata(
        self, request: oip.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name="penstock", version=_own_version())

    async def ModelMetadata(
        self, request: oip.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> oip.ModelMetadataResponse:
        model = self._model(request.name, request.version)
        response = oip.ModelMetadataResponse(
            name=model.name, versions=[_VERSION], platform="penstock"
        )
        tensors.describe(tensors.INPUTS, response.inputs.add)
        tensors.describe(tensors.OUTPUTS, response.outputs.add)
        return response

    async def ModelInfer(
        self, request: oip.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> oip.ModelInferResponse:
        inference = self._read(request)
        texts = [] if inference.excludes_input else [inference.request.prompt]
        last = generation_pb2.GenerateResponse()
        generated = self._generator.generate(
            inference.request, timeout_s=context.time_remaining(), caller=current_caller()
        )
        async with aclosing(generated):
            async for last in generated:
                texts.append(last.text)
        text = "".join(texts)
        return self._respond(request, inference, text, last, last.usage.completion_tokens)

    # It writes by itself, which the generated types do not know to be possible.
    async def ModelStreamInfer(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[oip.ModelInferRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Requests run beside each other; the responses of each keep their order."""
        answering = _StreamAnswering(context)
        await answer_beside_each_other(
            request_iterator,
            lambda tasks, request: tasks.create_task(self._answer(request, answering)),
            most=MAX_REQUESTS_A_STREAM,
        )

    async def _answer(self, request: oip.ModelInferRequest, answering: _StreamAnswering) -> None:
        """Writes all responses to one request of a stream; an error is the last of them."""
        try:
            inference = self._read(request)
            generated = self._generator.generate(
                inference.request,
                timeout_s=answering.context.time_remaining(),
                caller=current_caller(),
                parent=answering.parent,
            )
            async with aclosing(generated):
                async for response in self._responses(request, inference, generated):
                    await answering.write(oip.ModelStreamInferResponse(infer_response=response))
        except PenstockError as error:
            failed = oip.ModelStreamInferResponse(error_message=str(error))
            failed.infer_response.id = request.id
            failed.infer_response.model_name = request.model_name
            _mark_final(request, failed.infer_response, final=True)
            await answering.write(failed)

    async def _responses(
        self,
        request: oip.ModelInferRequest,
        inference: tensors.TextInference,
        generated: AsyncIterator[generation_pb2.GenerateResponse],
    ) -> AsyncIterator[oip.ModelInferResponse]:
        waiting = [] if inference.excludes_input else [inference.request.prompt]
        num_tokens = 0
        async for piece in generated:
            waiting.append(piece.text)
            num_tokens += len(piece.token_ids)
            ended = bool(piece.finish_reason)
            if not ended and not (inference.stream and any(waiting)):
                continue
            text = "".join(waiting)
            waiting.clear()
            response = self._respond(request, inference, text, piece, num_tokens)
            _mark_final(request, response, final=ended)
            yield response

    def _read(self, request: oip.ModelInferRequest) -> tensors.TextInference:
        self._model(request.model_name, request.model_version)
        return tensors.read_request(request)

    def _model(self, name: str, asked_version: str) -> generation_pb2.Model:
        model = self._generator.model(name, current_caller())
        if not name:
            message = f"the request names no model; served: {model.name!r}"
            raise NotFound(message, field="model_name")
        if asked_version not in ("", _VERSION):
            message = f"{name!r} has no version {shown(asked_version)}; served: {_VERSION!r}"
            raise NotFound(message, field="model_version")
        return model

    def _respond(
        self,
        request: oip.ModelInferRequest,
        inference: tensors.TextInference,
        text: str,
        piece: generation_pb2.GenerateResponse,
        num_tokens: int,
    ) -> oip.ModelInferResponse:
        reason = generation_pb2.FinishReason.Name(piece.finish_reason)
        answer = tensors.TextAnswer(
            text=text,
            finish_reason=reason.removeprefix("FINISH_REASON_").lower()
            if piece.finish_reason
            else "",
            num_input_tokens=piece.usage.prompt_tokens,
            num_output_tokens=num_tokens,
        )
        return tensors.write_response(
            answer, to=request, model=request.model_name, outputs=inference.outputs
        )


class _StreamAnswering:
    """What the requests of one stream share. One message is written at a time."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.parent = callers_context(context.invocation_metadata())
        self._writing = asyncio.Lock()

    async def write(self, response: oip.ModelStreamInferResponse) -> None:
        async with self._writing:
            await self.context.write(response)


def _mark_final(
    request: oip.ModelInferRequest, response: oip.ModelInferResponse, *, final: bool
) -> None:
    if tensors.parameter(request.parameters, _EMPTY_FINAL):
        response.parameters[_FINAL].bool_param = final


def _own_version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"
