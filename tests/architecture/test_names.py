"""`core` and `services` are short names: nobody else in the environment may own them."""

from __future__ import annotations

from importlib.metadata import packages_distributions

import pytest


@pytest.mark.parametrize("name", ["core", "services", "penstock", "oip"])
def test_no_other_distribution_owns_our_import_names(name: str) -> None:
    owners = set(packages_distributions().get(name, [])) - {"penstock"}
    assert not owners
