"""core/telemetry.py promises metrics and spans; some process makes each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core import telemetry

SERVICES = Path(__file__).parents[2] / "services"
PROMISED = sorted(
    name
    for name, value in vars(telemetry).items()
    if isinstance(value, telemetry.Metric | telemetry.Span)
)


@pytest.mark.parametrize("name", PROMISED)
def test_a_service_makes_every_metric_and_span(name: str) -> None:
    used = re.compile(rf"\bnames\.{name}\b")
    assert any(used.search(path.read_text()) for path in SERVICES.rglob("*.py"))
