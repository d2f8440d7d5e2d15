"""penstock.v1.GenerationService: RPC to core types and back, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import grpc
from penstock.v1 import generation_pb2, generation_pb2_grpc

from core.errors import InvalidInput
from services.gateway.caller import current_caller
from services.gateway.generation import TextGenerator
from services.gateway.many_answers import ManyAnswers
from services.gateway.validation import check_token_ids, set_fields, tokenise


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves generation.proto; errors become statuses in the server's interceptor."""

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        timeout_s = context.time_remaining()
        return self._generator.generate(request, timeout_s=timeout_s, caller=current_caller())

    def GenerateMany(
        self,
        request_iterator: AsyncIterator[generation_pb2.GenerateManyRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[generation_pb2.GenerateManyResponse]:
        return ManyAnswers(self._generator, context).responses(request_iterator)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        models = self._generator.models(current_caller())
        return generation_pb2.ListModelsResponse(models=models)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        model = self._generator.model(request.model, current_caller())
        if bool(request.prompt) == bool(request.messages):
            given = [name for name in ("prompt", "messages") if getattr(request, name)]
            raise InvalidInput("prompt", set_fields(given), "exactly one of prompt and messages")
        token_ids = await tokenise(
            request.prompt,
            request.messages,
            self._generator.tokenizer,
            threads=self._generator.threads,
            context_length=model.context_length,
        )
        return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.DetokenizeResponse:
        model = self._generator.model(request.model, current_caller())
        token_ids = list(request.token_ids)
        check_token_ids(token_ids, vocab_size=model.vocab_size)
        text = self._generator.tokenizer.decode(
            token_ids, skip_special_tokens=request.skip_special_tokens
        )
        return generation_pb2.DetokenizeResponse(text=text)
