"""`python -m tests.benchmarks.quality`: what number formats and codecs of the wire cost in quality.

Perplexity on WikiText-2 and accuracy on HellaSwag, of the engines themselves, in one stage or more.
The first format, with the first codec, is what the others are compared with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.progress import Progress
from rich.table import Table

from core.models.registry import load_config
from core.tokens.tokenizer import load_tokenizer
from core.weights.open import open_checkpoint
from services.cli.console import out as console
from services.local.catalogue import DEFAULT_MODEL
from services.local.fetch import resolve_model
from tests.benchmarks.tasks import (
    Question,
    answer,
    hellaswag_questions,
    perplexity,
    wikitext_windows,
)
from tests.support.chain import Chain
from tests.support.likelihood import log_likelihoods

CHUNK = 128  # rows whose logits are held at a time


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What is measured."""

    number_format: str
    wire: str
    num_stages: int

    @property
    def name(self) -> str:
        return self.number_format + (f", {self.wire} on the wire" if self.num_stages > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Quality(Arithmetic):
    """Of one arithmetic. `answers` has a choice for each question."""

    perplexity: float
    accuracy: float
    answers: list[int]


def main(
    model: Annotated[str, typer.Option(envvar="PENSTOCK_MODEL")] = DEFAULT_MODEL,
    formats: Annotated[
        str, typer.Option(envvar="PENSTOCK_FORMATS", help="Number formats, such as 'bf16 int8'.")
    ] = "bf16 fp32 int8 int4",
    stages: Annotated[
        int, typer.Option(envvar="PENSTOCK_STAGES", help="How many engines share the layers.")
    ] = 1,
    wires: Annotated[
        str,
        typer.Option(envvar="PENSTOCK_WIRES", help="Codecs between them, such as 'f32 bf16 int8'."),
    ] = "f32",
    windows: Annotated[
        int, typer.Option(envvar="PENSTOCK_WINDOWS", help="Windows of 1,024 tokens of WikiText-2.")
    ] = 32,
    questions: Annotated[
        int,
        typer.Option(envvar="PENSTOCK_QUESTIONS", help="Questions of HellaSwag, at most 10,042."),
    ] = 1000,
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write JSON.")
    ] = None,
) -> None:
    """Measures and prints a table."""
    path = resolve_model(model)
    asked = hellaswag_questions(questions)
    pairs = itertools.product(formats.split(), wires.split())
    measured = [
        Arithmetic(number_format=number_format, wire=wire, num_stages=stages)
        for number_format, wire in pairs
    ]
    with (
        Progress(console=console) as progress,
        ThreadPoolExecutor(2) as pool,
    ):  # kernels hold no GIL
        rows = list(pool.map(lambda one: _measure(path, one, windows, asked, progress), measured))
    console.print(quality_table(rows, asked))
    if json_path is not None:
        json_path.write_text(
            json.dumps([{"name": row.name} | asdict(row) for row in rows], indent=1) + "\n"
        )


def _measure(
    path: Path,
    arithmetic: Arithmetic,
    num_windows: int,
    questions: Sequence[Question],
    progress: Progress,
) -> Quality:
    task = progress.add_task(arithmetic.name, total=num_windows * 4 + len(questions))
    checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
    chain = Chain(
        checkpoint,
        load_config(checkpoint),
        **asdict(arithmetic),
        max_rows=CHUNK,
    )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    def model(token_ids: Sequence[int], *, advance: int = 4) -> npt.NDArray[np.float64]:
        chunks = chain.logits_in_chunks(token_ids, chunk=CHUNK)
        result = log_likelihoods(chunks, np.array(token_ids, np.int32))
        progress.advance(task, advance)
        return result

    result = perplexity(wikitext_windows(encode, num_windows), model)
    answers = []
    for question in questions:
        answers.append(answer(question, encode, lambda ids: model(ids, advance=0)))
        progress.advance(task)
    tokenizer.close()
    checkpoint.close()
    return Quality(
        **asdict(arithmetic),
        perplexity=result,
        accuracy=_share(answers, [question.right for question in questions]),
        answers=answers,
    )


def quality_table(rows: Sequence[Quality], questions: Sequence[Question]) -> Table:
    """Every arithmetic beside the first one."""
    first = rows[0]
    table = Table(
        title=f"perplexity on WikiText-2, accuracy on {len(questions)} questions of HellaSwag"
    )
    for column in (
        "format",
        "perplexity",
        f"against {first.name}",
        "accuracy",
        "same answers",
    ):
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        error = sqrt(row.accuracy * (1 - row.accuracy) / max(len(questions), 1))
        table.add_row(
            row.name,
            f"{row.perplexity:.3f}",
            f"{row.perplexity / first.perplexity - 1:+.2%}",
            f"{row.accuracy:.1%} +- {error:.1%}",
            f"{_share(row.answers, first.answers):.1%}",
        )
    return table


def _share(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of equal entries; of none, NaN."""
    return float(np.mean([a == b for a, b in zip(left, right, strict=True)])) if left else np.nan


if __name__ == "__main__":
    typer.run(main)
