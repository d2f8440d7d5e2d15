"""The GPU benchmark's own arithmetic, and what it says where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core.engine.cpu_backend import CpuBackend
from core.engine.devices import why_no_gpu
from tests.benchmarks.gpu.limits import step_bytes
from tests.benchmarks.gpu.models import SHAPES, RandomCheckpoint, config_of
from tests.benchmarks.gpu.ours import Load, decode_step_s, make_chain
from tests.benchmarks.gpu.report import Row, markdown
from tests.support.models import TinyModel


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2.5-coder-1.5b", 1.54), ("llama-3.1-8b", 7.5)]
)
def test_a_step_reads_every_matrix_once(name: str, billions: float) -> None:
    config = config_of(RandomCheckpoint(SHAPES[name]))
    read = step_bytes(config, num_sequences=0, mean_context=0.0)
    assert read / 2e9 == pytest.approx(billions, rel=0.01)


def test_a_step_reads_the_keys_and_values_of_every_position_seen() -> None:
    config = config_of(RandomCheckpoint(SHAPES["llama-3.1-8b"]))
    nothing, something = (
        step_bytes(config, num_sequences=sequences, mean_context=100.0) for sequences in (0, 3)
    )
    # 128 KiB a position: 32 layers of 8 heads of 128 keys and values in two bytes each.
    assert something - nothing == 3 * 100 * 128 * 1024


def test_a_chain_of_random_weights_decodes_a_load() -> None:
    model = TinyModel(num_layers=2)
    checkpoint = RandomCheckpoint(model)
    load = Load(num_sequences=3, prompt_tokens=5, num_steps=4)
    assert load.mean_context == 5 + 8 + 2.5
    chain = make_chain(
        checkpoint, config_of(checkpoint), num_stages=2, loads=[load], make_backend=CpuBackend
    )
    assert decode_step_s(chain, load, vocab_size=model.vocab_size) > 0.0


def test_a_row_is_compared_with_the_limit_and_with_others() -> None:
    row = Row(
        model="m",
        weights="random",
        stages=1,
        sequences=32,
        step_ms=4.0,
        limit_ms=3.0,
        boundary_us=None,
        generate_tokens_per_s=1600.0,
        continuous_tokens_per_s=None,
    )
    cells = [cell.strip() for cell in markdown([row]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["m", "random", "1", "32", "4.00", "8000", "75%", "", "1600 (5.0 x)", ""]


@pytest.mark.skipif(why_no_gpu("bf16") is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU to run on: ")
    assert len(done.stderr.splitlines()) == 1
