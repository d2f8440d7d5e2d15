"""The gateway of `tests/services/gateway`, for whom its port is what matters."""

from __future__ import annotations

from tests.services.gateway.conftest import resume_limit_s, setup, tokenizer

__all__ = ["resume_limit_s", "setup", "tokenizer"]
