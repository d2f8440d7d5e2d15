"""What `penstock certs` writes, and what is of use of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography import x509

from core.errors import InvalidInput, NotFound
from services.common.certificates import issue, make_authority, make_mesh
from services.common.credentials import Credentials, load_credentials
from services.common.identity import Identity


def names_in(folder: Path) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def serial_of(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes()).serial_number


def test_every_part_of_a_mesh_gets_an_identity_of_its_own(tmp_path: Path) -> None:
    make_mesh(tmp_path, mesh="m", num_stages=3)
    found = {folder.name: Credentials(folder).identity for folder in tmp_path.glob("*/")}
    roles = ("gateway", "coordinator", "supervisor", "operator", "stage/0", "stage/1", "stage/2")
    assert found == {role.replace("/", "-"): Identity(mesh="m", role=role) for role in roles}


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    make_mesh(tmp_path / "certs", mesh="m", num_stages=1)
    written = [path for path in (tmp_path / "certs").rglob("*") if path.is_file()]
    assert len(written) == 2 + 5 * 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("*"))


def test_an_identity_names_its_role_and_the_hosts_that_it_was_given(tmp_path: Path) -> None:
    make_authority(tmp_path, mesh="m")
    names = names_in(issue(tmp_path, "stage/1", hosts=["example.org", "10.0.0.7"]))
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://penstock/m/stage/1"
    ]
    hosts = names.get_values_for_type(x509.DNSName)
    assert hosts == ["stage-1.m.penstock.internal", "localhost", "example.org"]
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    assert list(addresses) == ["127.0.0.1", "::1", "10.0.0.7"]


@pytest.mark.parametrize(
    "host", ["coordinator.m.penstock.internal", "*.internal", "*", "", "a b", "http://x", "Ä.org"]
)
def test_hosts_cannot_stand_for_roles_or_for_everything(tmp_path: Path, host: str) -> None:
    make_authority(tmp_path, mesh="m")
    with pytest.raises(InvalidInput, match="host"):
        issue(tmp_path, "stage/1", hosts=[host])


def test_an_authority_is_not_replaced_unless_that_is_asked_for(tmp_path: Path) -> None:
    make_authority(tmp_path, mesh="m")
    before = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(InvalidInput, match="--replace"):
        make_mesh(tmp_path, mesh="m", num_stages=1)
    assert (tmp_path / "ca.key").read_bytes() == before
    make_mesh(tmp_path, mesh="m", num_stages=1, replaces=True)
    assert (tmp_path / "ca.key").read_bytes() != before


def test_a_renewed_identity_keeps_its_name_and_hosts_and_gets_a_new_key(tmp_path: Path) -> None:
    make_authority(tmp_path, mesh="m")
    folder = issue(tmp_path, "gateway", hosts=["example.org"])
    before = (names_in(folder), serial_of(folder), (folder / "key.pem").read_bytes())
    issue(tmp_path, "gateway")
    assert names_in(folder) == before[0]
    assert serial_of(folder) != before[1]
    assert (folder / "key.pem").read_bytes() != before[2]


def test_without_an_authority_nothing_is_certified(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="penstock certs init"):
        issue(tmp_path, "gateway")


def damaged(certs: Path, how: str) -> Path:
    """An identity that is of no use, for one reason."""
    folder = issue(certs, "stage/1")
    other = issue(certs, "stage/2")
    if how == "expired":
        issue(certs, "stage/1", days=0)
    elif how == "of another key":
        shutil.copy(other / "key.pem", folder / "key.pem")
    elif how == "of another authority":
        make_authority(certs / "others", mesh="m")
        shutil.copy(certs / "others" / "ca.pem", folder / "ca.pem")
    elif how == "no certificate":
        (folder / "cert.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("expired", "a certificate that is valid now"),
        ("of another key", "key.pem that belongs to cert.pem"),
        ("of another authority", "signed by one of ca.pem"),
        ("no certificate", "of `penstock certs`"),
    ],
)
def test_what_is_of_no_use_is_refused_when_a_process_starts(
    tmp_path: Path, how: str, message: str
) -> None:
    make_authority(tmp_path, mesh="m")
    with pytest.raises(InvalidInput, match=message):
        Credentials(damaged(tmp_path, how))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    make_authority(tmp_path, mesh="m")
    folder = issue(tmp_path, "stage/1")
    (folder / "key.pem").unlink()
    with pytest.raises(NotFound, match=r"stage-1/key.pem cannot be read"):
        Credentials(folder)


def test_a_process_does_not_start_with_the_identity_of_another_part(tmp_path: Path) -> None:
    make_authority(tmp_path, mesh="m")
    with pytest.raises(InvalidInput, match="the identity of a coordinator"):
        load_credentials(issue(tmp_path, "stage/1"), kind="coordinator")
    assert load_credentials(None, kind="coordinator") is None
