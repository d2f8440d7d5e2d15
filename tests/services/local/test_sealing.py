"""From the user's wishes to a sealed folder, and from a sealed folder to a mesh's command lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from core.errors import InvalidInput, NotFound, SealBroken
from core.weights.sealed.header import SealHeader, read_header
from core.weights.sealed.identity import PublicIdentity, read_public_identity, write_identity
from services.local.layout import MeshLayout
from services.local.ports import HeldPorts
from services.local.prepare import prepare
from services.local.seal_keys import follow_seal
from services.local.sealing import SealWishes, parse_holder, rewrap_model, seal_model
from services.local.settings import MeshSettings
from tests.support.models import write_servable


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("owner", "stage-0", "stage-1"):
        write_identity(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def sealed(tmp_path: Path, keys: Path) -> Path:
    plain = write_servable(tmp_path / "plain")
    seal_model(plain, tmp_path / "sealed", wishes(keys, split="0:1,1:4"), name="m", version="1")
    return tmp_path / "sealed"


def wishes(
    keys: Path, *, split: str | None = None, holders: Mapping[str, PublicIdentity] | None = None
) -> SealWishes:
    return SealWishes(keys=keys, split=split, holders=holders or {})


def layers_of(header: SealHeader, name: str) -> set[str]:
    return {part for part in header.holders[name].wraps if part.startswith("layer")}


def mesh_of(sealed: Path, keys: Path, **options: object) -> MeshSettings:
    return MeshSettings(model=str(sealed), seal_keys=keys, grpc_port=0, metrics_port=0, **options)  # type: ignore[arg-type]


def laid_out(settings: MeshSettings) -> MeshLayout:
    with HeldPorts() as ports:
        return prepare(settings, ports=ports)


def test_a_sealed_model_is_cut_as_it_was_sealed(sealed: Path, keys: Path) -> None:
    assert follow_seal(mesh_of(sealed, keys)).split == "0:1,1:4"
    assert follow_seal(mesh_of(sealed, keys, split="0:2,2:4")).split == "0:2,2:4"


def test_a_mesh_does_not_guess_its_cut_from_the_keys_of_two(sealed: Path, keys: Path) -> None:
    write_identity(keys, "stage-2")
    rewrap_model(sealed, wishes(keys, split="0:1,1:2,2:4"), revoked=(), deals=True, keeps=True)
    words = r"no one cut \(stage-0 opens 0:1, stage-1 opens 1:4, stage-2 opens 2:4\); .* rewrap"
    with pytest.raises(InvalidInput, match=words):
        follow_seal(mesh_of(sealed, keys))
    assert follow_seal(mesh_of(sealed, keys, split="0:1,1:4")).split == "0:1,1:4"


def test_a_mesh_does_not_guess_its_cut_where_a_stage_has_no_keys(sealed: Path, keys: Path) -> None:
    rewrap_model(sealed, wishes(keys), revoked=["stage-1"], deals=False)
    with pytest.raises(InvalidInput, match=r"\(stage-0 opens 0:1\)"):
        follow_seal(mesh_of(sealed, keys))


def test_processes_are_told_where_their_keys_are(sealed: Path, keys: Path) -> None:
    layout = laid_out(mesh_of(sealed, keys))
    stages = [layout.stage_command(index, layout.stages[index].replicas[0]) for index in range(2)]
    for index, command in enumerate(stages):
        assert str(keys / f"stage-{index}.key") in command.arguments
        assert str(keys / "owner.pub") in command.arguments
    gateway = layout.gateway_command().arguments
    assert str(keys / "owner.pub") in gateway
    assert not any(argument.endswith(".key") for argument in gateway)


def test_without_the_keys_a_sealed_model_is_not_served(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"owner\.pub"):
        laid_out(mesh_of(sealed, tmp_path / "no-keys"))


def test_a_model_that_another_owner_sealed_is_not_served(sealed: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    write_identity(others, "owner")
    write_identity(others, "stage-0")
    with pytest.raises(SealBroken):
        laid_out(mesh_of(sealed, others))


def deal_to_a_second_holder(sealed: Path, keys: Path, elsewhere: Path) -> None:
    """Lets stage-1-b, whose keys are made in `elsewhere`, open what stage-1 opens in 0:1,1:4."""
    public = write_identity(elsewhere, "host").with_suffix(".pub")
    holders = dict([parse_holder(f"stage-1-b={public}")])
    rewrap_model(sealed, wishes(keys, split="0:1,1:4", holders=holders), revoked=(), deals=True)


def test_a_second_holder_of_a_stage_gets_the_same_layers(
    sealed: Path, keys: Path, tmp_path: Path
) -> None:
    deal_to_a_second_holder(sealed, keys, tmp_path / "elsewhere")
    header = read_header(sealed, sealer=read_public_identity(keys / "owner.pub"))
    assert layers_of(header, "stage-1-b") == layers_of(header, "stage-1")
    assert layers_of(header, "stage-0") == {"layer-0"}


def test_while_layers_move_stages_can_have_both(sealed: Path, keys: Path) -> None:
    header = rewrap_model(sealed, wishes(keys, split="0:2,2:4"), revoked=(), deals=True, keeps=True)
    assert layers_of(header, "stage-0") == {"layer-0", "layer-1"}
    assert layers_of(header, "stage-1") == {"layer-1", "layer-2", "layer-3"}


def test_whoever_is_no_stage_any_more_is_to_be_revoked(sealed: Path, keys: Path) -> None:
    one_stage = wishes(keys, split="0:4")
    before = read_header(sealed, sealer=read_public_identity(keys / "owner.pub"))
    with pytest.raises(InvalidInput, match=r"stage-1 \(1:4\), which would keep .* --keep"):
        rewrap_model(sealed, one_stage, revoked=(), deals=True)
    assert read_header(sealed, sealer=read_public_identity(keys / "owner.pub")) == before
    header = rewrap_model(sealed, one_stage, revoked=["stage-1"], deals=True)
    assert sorted(header.holders) == ["owner", "stage-0"]


def test_a_second_holder_does_not_keep_what_its_stage_has_lost(
    sealed: Path, keys: Path, tmp_path: Path
) -> None:
    deal_to_a_second_holder(sealed, keys, tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match=r"revoke.*stage-1-b \(1:4\)"):
        rewrap_model(sealed, wishes(keys, split="0:2,2:4"), revoked=(), deals=True)


def test_revoking_deals_nothing_out(sealed: Path, keys: Path) -> None:
    header = rewrap_model(sealed, wishes(keys), revoked=["stage-1"], deals=False)
    assert sorted(header.holders) == ["owner", "stage-0"]
    assert layers_of(header, "stage-0") == {"layer-0"}


@pytest.mark.parametrize("text", ["stage-0", "host=x.pub", "stage-x=x.pub", "=x.pub"])
def test_a_holder_has_the_name_of_a_stage(text: str) -> None:
    with pytest.raises(InvalidInput, match="STAGE=FILE"):
        parse_holder(text)


def test_a_holder_of_a_stage_that_there_is_not_is_refused(sealed: Path, keys: Path) -> None:
    public = read_public_identity(keys / "stage-1.pub")
    asked = wishes(keys, split="0:1,1:4", holders={"stage-2": public})
    with pytest.raises(InvalidInput, match="stage-0 to stage-1"):
        rewrap_model(sealed, asked, revoked=(), deals=True)
