"""Tokenizers of each kind, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.tokens.tokenizer import Tokenizer, load_tokenizer
from services.local.fetch import resolve_model
from tests.support.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Tokenizer]:
    tokenizer = load_tokenizer(smollm2_path)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="session")
def stories15m() -> Tokenizer:
    return load_tokenizer(resolve_model("stories15m"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))
    yield tokenizer
    tokenizer.close()
