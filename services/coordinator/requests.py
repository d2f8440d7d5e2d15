"""The requests of all gateways: from their submission to the news of their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from penstock.v1 import coordinator_pb2

from core import telemetry as names
from core.errors import InvalidInput, PenstockError
from core.pipeline.actions import EmitTokens, Refuse, Usage
from core.pipeline.cut import Cut
from core.pipeline.events import Event, RequestArrived, RequestCancelled
from core.sampling.validation import validate_parameters
from services.common.durations import seconds
from services.common.telemetry import Telemetry
from services.coordinator import messages
from services.coordinator.gateway_stream import GatewayStream
from services.coordinator.spans import RequestSpans

_ANY_VOCAB_SIZE = 2**32  # while it is not known: ids have 32 bits


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request of a gateway that has not ended."""

    gateway: GatewayStream
    gateway_request_id: int
    traceparent: str
    arrived_ns: int  # Unix time


class Requests:
    """Numbers requests, and brings each its news over the stream of its gateway."""

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        post: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        """`post` takes what the scheduler must know."""
        self._post = post
        self._clock = clock
        self._spans = RequestSpans(telemetry)
        self._queue_histogram = telemetry.histogram(names.QUEUE_DURATION)
        self._open: dict[int, OpenRequest] = {}
        self._next_id = 1
        self._gateways: set[GatewayStream] = set()
        self._touched: set[GatewayStream] = set()
        self._is_closed = False
        self.vocab_size = 0  # 0: not known yet
        self.labels: dict[str, str] = {}  # of metrics

    @property
    def are_there_any(self) -> bool:
        return bool(self._open)

    # --- gateways

    def connect(self, mesh: coordinator_pb2.MeshState) -> GatewayStream:
        """Takes a gateway in."""
        gateway = GatewayStream()
        gateway.set_mesh(mesh)
        self._gateways.add(gateway)
        if self._is_closed:
            gateway.close()
        return gateway

    def disconnect(self, gateway: GatewayStream) -> None:
        """Lets a gateway go; its open requests are cancelled."""
        self._gateways.discard(gateway)
        gateway.leave()
        for request_id in gateway.request_ids.values():
            self._post(RequestCancelled(request_id=request_id))

    def close(self) -> None:
        """Lets every gateway's stream end once it has sent what it holds."""
        self._is_closed = True
        for gateway in self._gateways:
            gateway.close()

    def beat(self) -> None:
        """Gives every gateway a sign of life."""
        for gateway in self._gateways:
            gateway.beat()

    def tell_mesh(self, mesh: coordinator_pb2.MeshState) -> None:
        """Tells all gateways at once."""
        for gateway in self._gateways:
            gateway.set_mesh(mesh)

    def receive(self, gateway: GatewayStream, request: coordinator_pb2.ConnectRequest) -> None:
        """Takes what a gateway asks for; requests that are wrong are refused one by one."""
        for submission in request.submissions:
            try:
                self.submit(gateway, submission)
            except PenstockError as error:
                update = gateway.add_update(submission.request_id)
                messages.write_refusal(update, Refuse(request_id=0, error=error))
                gateway.wake()
        for cancellation in request.cancellations:
            request_id = gateway.request_ids.get(cancellation.request_id)
            if request_id is not None:
                self._post(RequestCancelled(request_id=request_id))

    def submit(
        self,
        gateway: GatewayStream,
        submission: coordinator_pb2.Submission,
        *,
        probed: Cut | None = None,
    ) -> None:
        """Hands a request to the scheduler; raises InvalidInput. One that probes a cut stays on
        it."""
        if submission.request_id in gateway.request_ids:
            raise InvalidInput("request_id", submission.request_id, "unique within the stream")
        token_ids = list(submission.token_ids)
        if self.vocab_size and token_ids and max(token_ids) >= self.vocab_size:
            raise InvalidInput("token_ids", max(token_ids), f"ids below {self.vocab_size}")
        num_output_tokens = submission.num_output_tokens
        if num_output_tokens and num_output_tokens >= len(token_ids):
            allowed = f"below the number of token ids, {len(token_ids)}"
            raise InvalidInput("num_output_tokens", num_output_tokens, allowed)
        sampling = messages.sampling_parameters(submission.sampling)
        # A stage would refuse it too, but its whole stream with it, and again after each restart.
        validate_parameters(sampling, vocab_size=self.vocab_size or _ANY_VOCAB_SIZE)
        deadline_s = None
        if submission.HasField("timeout"):
            deadline_s = self._clock() + seconds(submission.timeout)
        request_id = self._next_id
        self._next_id += 1
        gateway.request_ids[submission.request_id] = request_id
        self._open[request_id] = OpenRequest(
            gateway, submission.request_id, submission.traceparent, time.time_ns()
        )
        self._post(
            RequestArrived(
                request_id=request_id,
                token_ids=token_ids,
                num_output_tokens=num_output_tokens,
                sampling=sampling,
                deadline_s=deadline_s,
                traceparent=submission.traceparent,
                cache_salt=submission.cache_salt,
                tenant=submission.tenant,
                priority=submission.priority,
                probed=probed,
                began_on=messages.cut_from(submission.began_on) if num_output_tokens else None,
            )
        )

    # --- news

    def emit(self, action: EmitTokens) -> None:
        """Adds news of a request to what its gateway is sent by `wake`."""
        request = self._open[action.request_id]
        gateway = request.gateway
        self._touched.add(gateway)
        if action.finish_reason is None and not action.logprobs:
            if action.began_on is not None:
                # Apart from the tokens, which more may follow in the same message.
                update = gateway.add_update(request.gateway_request_id)
                messages.write_beginning(update, action.began_on)
            gateway.add_tokens(request.gateway_request_id, action.token_ids)
            return
        messages.write_news(gateway.add_update(request.gateway_request_id), action)
        if action.finish_reason is not None:
            self._end(action.request_id, action.usage, action.finish_reason.value)

    def refuse(self, action: Refuse) -> None:
        """Ends a request with an error."""
        request = self._open[action.request_id]
        update = request.gateway.add_update(request.gateway_request_id)
        messages.write_refusal(update, action)
        self._touched.add(request.gateway)
        self._end(action.request_id, action.usage, "error")

    def wake(self) -> None:
        """Lets the news of this turn leave."""
        for gateway in self._touched:
            gateway.wake()
        self._touched.clear()

    def _end(self, request_id: int, usage: Usage | None, finish_reason: str) -> None:
        request = self._open.pop(request_id)
        del request.gateway.request_ids[request.gateway_request_id]
        if usage is not None:
            self._queue_histogram.record(usage.queue_s, self.labels)
            self._spans.record(
                traceparent=request.traceparent,
                request_id=request_id,
                arrived_ns=request.arrived_ns,
                usage=usage,
                finish_reason=finish_reason,
            )
