"""A cut is no privacy: whoever sees activations reads the tokens.

These tests assert that the attack works. Should one of them fail, mend the attack: SECURITY.md
tells users not to rely on anything else.
"""

from __future__ import annotations

import pytest

from tests.numerics.conftest import RealModel
from tests.support.inversion import FirstStage, Inverter, Lossy, rounded_to_int8, unchanged

SECRET = "My password is hunter2, and Dr. Nowak in Gdansk says that the tumour is benign."
NUM_TOKENS = 20
# Every conversation begins so: no secret.
OPENING = "<|im_start|>user\n"
NUM_TEXTS = 96

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def stage(smollm2: RealModel) -> FirstStage:
    """Cut where `make mesh` cuts."""
    return FirstStage(smollm2.checkpoint, smollm2.config, end_layer=18)


@pytest.fixture(scope="module")
def inverter(stage: FirstStage) -> Inverter:
    return Inverter(stage, num_texts=NUM_TEXTS)


@pytest.mark.parametrize("lossy", [unchanged, rounded_to_int8])
def test_a_stage_that_sees_activations_reads_every_token_back(
    smollm2: RealModel, stage: FirstStage, inverter: Inverter, lossy: Lossy
) -> None:
    opening = smollm2.tokenizer.encode(OPENING)
    secret = smollm2.tokenizer.encode(SECRET)[:NUM_TOKENS]
    seen_TH = lossy(stage.run([[*opening, *secret]])[len(opening) :])
    assert len(secret) == NUM_TOKENS
    assert inverter.recover(seen_TH, known=opening, lossy=lossy) == secret
