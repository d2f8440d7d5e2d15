"""`python -m tests.benchmarks.gpu`: the CUDA tests on the card, and then how fast it decodes.

A step is one token for each of the sequences, greedy, in bf16, behind prompts of 64 tokens. The
engines of all stages run one after the other in this process: what a boundary adds is the way
of the activations through the host, without the network's share.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from core.engine.devices import why_no_gpu
from tests.benchmarks.gpu.report import Row, markdown, progress

STAGES = (1, 2, 4)
SEQUENCES = (1, 32, 128)
PROMPT_TOKENS = 64


def main(
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write JSON.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Decode steps of each measurement.")] = 128,
) -> None:
    """Tests, measures, and prints a table."""
    problem = why_no_gpu("bf16")
    if problem is not None:
        typer.echo(f"no GPU to run on: {problem}", err=True)
        raise typer.Exit(code=1)
    run_tests()
    from tests.benchmarks.gpu.limits import copy_bytes_per_s
    from tests.benchmarks.gpu.models import SHAPES

    bytes_per_s = copy_bytes_per_s()
    rows = []
    for name in SHAPES:
        for row in measure(name, bytes_per_s, num_steps=steps):
            typer.echo(progress(row), err=True)
            rows.append(row)
    facts = device_facts() | {"copy_gb_per_s": round(bytes_per_s / 1e9)}
    typer.echo(f"{facts}\n\n{markdown(rows)}")
    if json_path is not None:
        document = facts | {"rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(document, indent=1) + "\n")


def run_tests() -> None:
    """Those that need a card; ends the program where one fails."""
    tests = ["tests/core/kernels", "tests/core/engine"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", *tests], check=False)
    if done.returncode:
        raise typer.Exit(code=done.returncode)


def measure(name: str, bytes_per_s: float, *, num_steps: int) -> Iterator[Row]:
    """All cuts and loads of one model; transformers beside the uncut one."""
    import torch

    from core.engine.cuda_backend import CudaBackend
    from tests.benchmarks.gpu.limits import step_bytes
    from tests.benchmarks.gpu.models import SHAPES, config_of, find_checkpoint
    from tests.benchmarks.gpu.ours import Load, decode_step_s, make_chain
    from tests.benchmarks.gpu.theirs import TransformersModel

    loads = [
        Load(num_sequences=count, prompt_tokens=PROMPT_TOKENS, num_steps=num_steps)
        for count in SEQUENCES
    ]
    theirs_model = TransformersModel(SHAPES[name])
    theirs = {load: theirs_model.rates(load) for load in loads}
    del theirs_model
    checkpoint, weights = find_checkpoint(name)
    config = config_of(checkpoint)
    uncut_s: dict[Load, float] = {}
    for num_stages in STAGES:
        gc.collect()
        torch.cuda.empty_cache()
        chain = make_chain(
            checkpoint, config, num_stages=num_stages, loads=loads, make_backend=CudaBackend
        )
        for load in loads:
            step_s = decode_step_s(chain, load, vocab_size=config.vocab_size)
            uncut_s.setdefault(load, step_s)
            read = step_bytes(
                config, num_sequences=load.num_sequences, mean_context=load.mean_context
            )
            cuts = num_stages - 1
            yield Row(
                model=name,
                weights=weights,
                stages=num_stages,
                sequences=load.num_sequences,
                step_ms=step_s * 1e3,
                limit_ms=read / bytes_per_s * 1e3,
                boundary_us=(step_s - uncut_s[load]) / cuts * 1e6 if cuts else None,
                generate_tokens_per_s=None if cuts else theirs[load].generate,
                continuous_tokens_per_s=None if cuts else theirs[load].continuous,
            )
        del chain


def device_facts() -> dict[str, object]:
    """What was measured on."""
    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    typer.run(main)
