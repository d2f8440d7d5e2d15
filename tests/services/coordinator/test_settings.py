"""What the operator may write."""

from __future__ import annotations

import pytest

from core.errors import InvalidInput
from services.coordinator.settings import parse_tenant_weights


def test_tenants_have_the_weights_that_are_written() -> None:
    assert parse_tenant_weights(" gold=4, free=0.5,") == {"gold": 4.0, "free": 0.5}
    assert parse_tenant_weights("") == {}


@pytest.mark.parametrize("text", ["gold", "gold=much", "=,"])
def test_what_is_no_weight_is_refused_with_what_was_written(text: str) -> None:
    with pytest.raises(InvalidInput, match="tenant_weights"):
        parse_tenant_weights(text)
