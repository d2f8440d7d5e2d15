"""Who may open what can change without the weights being touched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InvalidInput, KeyRefused, SealBroken
from core.weights.sealed.header import read_header, write_header
from core.weights.sealed.identity import SealKeys, make_identity
from core.weights.sealed.opening import open_sealed
from core.weights.sealed.sealing import Grant, rewrap
from tests.support.models import TinyModel, write_gguf
from tests.support.sealed_models import SealedModel, grant_for, seal_for_stages


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", TinyModel())


@pytest.fixture
def sealed(plain: Path, tmp_path: Path) -> SealedModel:
    return seal_for_stages(plain, tmp_path / "sealed")


def test_a_new_partition_takes_new_wraps_and_the_same_weights(
    plain: Path, sealed: SealedModel
) -> None:
    weights = sealed.folder / "m.gguf.sealed"
    before = hashlib.sha256(weights.read_bytes()).digest()
    first, second = (identity.public for identity in sealed.stages)
    grants = {
        "stage-0": grant_for(plain, first, 0, 3),
        "stage-1": grant_for(plain, second, 3, 4),
    }
    rewrap(sealed.folder, owner=sealed.owner, grants=grants)
    open_sealed(sealed.folder, sealed.keys(0)).read("blk.2.attn_q.weight")
    with pytest.raises(KeyRefused):
        open_sealed(sealed.folder, sealed.keys(1)).read("blk.2.attn_q.weight")
    open_sealed(sealed.folder, sealed.keys(1)).read("blk.3.attn_q.weight")
    assert hashlib.sha256(weights.read_bytes()).digest() == before


def test_who_keeps_what_he_had_opens_layers_of_both_partitions(
    plain: Path, sealed: SealedModel
) -> None:
    first, second = (identity.public for identity in sealed.stages)
    grants = {
        "stage-0": grant_for(plain, first, 0, 1),
        "stage-1": grant_for(plain, second, 1, 4),
    }
    rewrap(sealed.folder, owner=sealed.owner, grants=grants, keeps=True)
    open_sealed(sealed.folder, sealed.keys(0)).read("blk.1.attn_q.weight")
    open_sealed(sealed.folder, sealed.keys(1)).read("blk.1.attn_q.weight")
    with pytest.raises(KeyRefused):
        open_sealed(sealed.folder, sealed.keys(0)).read("blk.2.attn_q.weight")
    rewrap(sealed.folder, owner=sealed.owner, grants=grants)
    with pytest.raises(KeyRefused):
        open_sealed(sealed.folder, sealed.keys(0)).read("blk.1.attn_q.weight")


def test_what_another_identity_of_the_same_name_had_is_not_kept(
    plain: Path, sealed: SealedModel
) -> None:
    other = make_identity()
    grants = {"stage-1": grant_for(plain, other.public, 3, 4)}
    rewrap(sealed.folder, owner=sealed.owner, grants=grants, keeps=True)
    keys = SealKeys(sealer=sealed.owner.public, identity=other)
    open_sealed(sealed.folder, keys).read("blk.3.attn_q.weight")
    with pytest.raises(KeyRefused):
        open_sealed(sealed.folder, keys).read("blk.2.attn_q.weight")


def test_a_revoked_holder_is_refused_and_the_others_are_not(sealed: SealedModel) -> None:
    rewrap(sealed.folder, owner=sealed.owner, grants={}, revoked=["stage-1"])
    with pytest.raises(KeyRefused, match="it was revoked"):
        open_sealed(sealed.folder, sealed.keys(1)).read("blk.3.attn_q.weight")
    open_sealed(sealed.folder, sealed.keys(0)).read("blk.0.attn_q.weight")


@pytest.mark.parametrize("name", ["stage-1", "stage-1-b"])
def test_a_key_is_not_revoked_and_given_layers_at_once(
    plain: Path, sealed: SealedModel, name: str
) -> None:
    header = read_header(sealed.folder, sealer=sealed.owner.public)
    grants = {name: grant_for(plain, sealed.stages[1].public, 2, 4)}
    with pytest.raises(InvalidInput, match=f"revoke is 'stage-1'.*--for {name}=FILE"):
        rewrap(sealed.folder, owner=sealed.owner, grants=grants, revoked=["stage-1"])
    assert read_header(sealed.folder, sealer=sealed.owner.public) == header


def test_a_holder_whose_key_was_lost_gets_another(plain: Path, sealed: SealedModel) -> None:
    newcomer = make_identity()
    grants = {"stage-1": grant_for(plain, newcomer.public, 2, 4)}
    rewrap(sealed.folder, owner=sealed.owner, grants=grants, revoked=["stage-1"])
    with pytest.raises(KeyRefused):
        open_sealed(sealed.folder, sealed.keys(1)).read("blk.3.attn_q.weight")
    keys = SealKeys(sealer=sealed.owner.public, identity=newcomer)
    open_sealed(sealed.folder, keys).read("blk.3.attn_q.weight")


def test_a_replica_can_be_let_in_later(plain: Path, sealed: SealedModel) -> None:
    newcomer = make_identity()
    grants = {"stage-0-b": grant_for(plain, newcomer.public, 0, 2)}
    rewrap(sealed.folder, owner=sealed.owner, grants=grants)
    keys = SealKeys(sealer=sealed.owner.public, identity=newcomer)
    for keys_of_one in (keys, sealed.keys(0)):
        open_sealed(sealed.folder, keys_of_one).read("blk.0.attn_q.weight")


def test_nobody_but_the_owner_rewraps(plain: Path, sealed: SealedModel) -> None:
    with pytest.raises(SealBroken):
        rewrap(sealed.folder, owner=sealed.stages[0], grants={})


def with_wraps(sealed: SealedModel, name: str, wraps: Mapping[str, bytes]) -> None:
    """Rewrites the header as only its owner can."""
    header = read_header(sealed.folder, sealer=sealed.owner.public)
    holder = replace(header.holders[name], wraps={**header.holders[name].wraps, **wraps})
    changed = replace(header, holders={**header.holders, name: holder})
    write_header(sealed.folder, changed, sealer=sealed.owner)


def wraps_of(sealed: SealedModel, name: str) -> Mapping[str, bytes]:
    return read_header(sealed.folder, sealer=sealed.owner.public).holders[name].wraps


def test_a_wrap_is_of_no_use_to_another_holder(sealed: SealedModel) -> None:
    with_wraps(sealed, "stage-0", {"layer-2": wraps_of(sealed, "stage-1")["layer-2"]})
    with pytest.raises(SealBroken, match="does not open"):
        open_sealed(sealed.folder, sealed.keys(0)).read("blk.2.attn_q.weight")


def test_a_wrap_is_of_no_use_for_another_part(sealed: SealedModel) -> None:
    with_wraps(sealed, "stage-1", {"layer-2": wraps_of(sealed, "stage-1")["layer-3"]})
    with pytest.raises(SealBroken, match="the wrapped key of 'layer-2'"):
        open_sealed(sealed.folder, sealed.keys(1)).read("blk.2.attn_q.weight")


@pytest.mark.parametrize("name", ["nobody", "owner"])
def test_only_a_holder_who_is_not_the_owner_can_be_revoked(sealed: SealedModel, name: str) -> None:
    with pytest.raises(InvalidInput, match="a holder: stage-0, stage-1"):
        rewrap(sealed.folder, owner=sealed.owner, grants={}, revoked=[name])


def test_the_owners_name_is_taken(sealed: SealedModel) -> None:
    grant = Grant(identity=make_identity().public, parts=())
    with pytest.raises(InvalidInput, match="who has all keys anyway"):
        rewrap(sealed.folder, owner=sealed.owner, grants={"owner": grant})
