"""Another family, another tokenizer, another quantisation: served as a user would serve it."""

from __future__ import annotations

from pathlib import Path

from penstock.v1 import generation_pb2 as pb

from tests.support.client import connect
from tests.support.local_mesh import LocalMesh


def test_qwen_coder_answers_through_three_stages(tmp_path: Path) -> None:
    mesh = LocalMesh(runtime=tmp_path, environment={})
    model = "qwen2.5-coder-0.5b-instruct"
    mesh.start("--model", model, "--stages", "3", "--kv-memory", "96MiB")
    try:
        record = mesh.record
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            (listed,) = client.generation.ListModels(pb.ListModelsRequest()).models
            assert (listed.name, listed.num_stages) == (model, 3)
            answer = client.generate(
                chat="Write a Python function is_even(n). Only the code.",
                sampling={"temperature": 0.0, "max_tokens": 64},
            )
        assert "def is_even(n" in answer.text
        assert "% 2" in answer.text
    finally:
        mesh.stop()
