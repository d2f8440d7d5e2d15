"""A real OTLP/gRPC trace collector in its own process: writes every span as a JSON line.

    python -m tests.support.otlp_receiver SPANS.jsonl

prints its port on standard output and ends when standard input does. Each line has
trace_id, span_id, parent_span_id (hexadecimal, empty for a root), name, service,
kind, start_ns, end_ns, attributes and resource.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class OtlpReceiver:
    """A running collector."""

    endpoint: str
    spans_path: Path

    def spans(self) -> list[dict[str, Any]]:
        """Returns the spans received so far, whole lines only."""
        if not self.spans_path.exists():
            return []
        lines = self.spans_path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def wait_for(
        self, enough: Callable[[list[dict[str, Any]]], bool], *, timeout_s: float = 30.0
    ) -> list[dict[str, Any]]:
        """Returns the spans as soon as `enough` of them are there; fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            spans = self.spans()
            if enough(spans):
                return spans
            names = [(span["service"], span["name"]) for span in spans]
            assert time.monotonic() < deadline, f"not enough spans: {names}"
            time.sleep(0.02)


@contextmanager
def otlp_receiver(folder: Path) -> Iterator[OtlpReceiver]:
    """Runs a collector that writes into `folder`."""
    spans_path = folder / "spans.jsonl"
    command = [sys.executable, "-m", "tests.support.otlp_receiver", str(spans_path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield OtlpReceiver(endpoint=f"http://127.0.0.1:{port}", spans_path=spans_path)
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


_ROOT = Path(__file__).resolve().parents[2]


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, out: TextIO) -> None:
        self._out = out

    def Export(self, request: Any, context: Any) -> Any:
        for line in _lines(request):
            self._out.write(json.dumps(line) + "\n")
        self._out.flush()
        return trace_service_pb2.ExportTraceServiceResponse()


def _lines(request: Any) -> Iterator[dict[str, Any]]:
    for group in request.resource_spans:
        resource = _plain(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield {
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent_span_id": span.parent_span_id.hex(),
                    "name": span.name,
                    "service": resource.get("service.name", ""),
                    "kind": span.kind,
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "attributes": _plain(span.attributes),
                    "resource": resource,
                }


def _plain(attributes: Any) -> dict[str, Any]:
    return {entry.key: _value(entry.value) for entry in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def main() -> None:
    with open(sys.argv[1], "a", encoding="utf-8") as out:
        # One worker, so that lines never mix.
        server = grpc.server(ThreadPoolExecutor(max_workers=1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Collector(out), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        print(port, flush=True)
        sys.stdin.read()
        server.stop(grace=None).wait()


if __name__ == "__main__":
    main()
