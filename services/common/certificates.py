"""Makes a certificate authority for development, and the identities that it certifies.

    FOLDER/ca.pem, ca.key             the authority; whoever has its key can be any part of the mesh
    FOLDER/NAME/cert.pem, key.pem     an identity (NAME is gateway, coordinator, stage-0 ...)
    FOLDER/NAME/ca.pem                the authority again, so that the folder can be taken elsewhere
    FOLDER/revoked.txt                certificates that are shut out; a copy in each NAME, likewise

Keys are of P-256: the TLS library inside gRPC's wheels does not take Ed25519 certificates.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import InvalidInput, NotFound
from services.common.credentials import (
    AUTHORITIES,
    AUTHORITY_DAYS,
    CERTIFICATE,
    IDENTITY_DAYS,
    KEY,
    REVOKED,
    fingerprint_of,
)
from services.common.identity import (
    COORDINATOR,
    DNS_SUFFIX,
    GATEWAY,
    OPERATOR,
    SUPERVISOR,
    Identity,
    stage_role,
)

AUTHORITY_KEY = "ca.key"
# In every certificate, so that clients on the same machine can check its public port.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
# Clocks of machines differ by a little.
_CLOCK_SKEW = timedelta(minutes=5)


class Authority(NamedTuple):
    """Signs the certificates of one mesh, whose name its own has as the organisation's."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def mesh(self) -> str:
        (name,) = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(name.value)


def make_mesh(
    folder: Path,
    *,
    mesh: str,
    num_stages: int,
    hosts: Iterable[str] = (),
    days: int = IDENTITY_DAYS,
    replaces: bool = False,
) -> None:
    """Makes an authority and an identity of every role; raises InvalidInput where there is an
    authority, unless it `replaces` that."""
    hosts = tuple(hosts)
    make_authority(folder, mesh=mesh, replaces=replaces)
    stages = map(stage_role, range(num_stages))
    for role in (GATEWAY, COORDINATOR, SUPERVISOR, OPERATOR, *stages):
        issue(folder, role, hosts=hosts, days=days)


def make_authority(folder: Path, *, mesh: str, replaces: bool = False) -> None:
    """Makes an authority; raises InvalidInput where there is one, unless it `replaces` that."""
    Identity(mesh=mesh, role=OPERATOR)  # refuses what no identity can be called
    if (folder / AUTHORITY_KEY).exists() and not replaces:
        raise InvalidInput("folder", str(folder), "one without an authority, or --replace")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(mesh=mesh, name="Penstock development authority")
    certificate = (
        _builder(name, issuer=name, public_key=key.public_key(), days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(folder / AUTHORITY_KEY, _pem_of_key(key))
    _write(folder / AUTHORITIES, certificate.public_bytes(Encoding.PEM))


def issue(
    folder: Path,
    role: str,
    *,
    hosts: Iterable[str] | None = None,
    days: int = IDENTITY_DAYS,
    revokes: bool = False,
) -> Path:
    """Writes a new key and certificate, in place of those there may be; returns their folder.

    `hosts` are names and addresses under which clients of a public port reach it, besides
    loopback's; None: those of the certificate that is replaced, which is shut out if this
    `revokes` it. Raises NotFound where there is no authority, or nothing to revoke, InvalidInput.
    """
    authority = _load_authority(folder)
    identity = Identity(mesh=authority.mesh, role=role)
    own = folder / identity.name
    names = _names(identity, _hosts_of(own / CERTIFICATE) if hosts is None else hosts)
    if revokes:
        _add_to_revoked(folder, own / CERTIFICATE)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certify(identity.name, key.public_key(), names, authority=authority, days=days)
    own.mkdir(exist_ok=True, mode=0o700)
    _write(own / AUTHORITIES, (folder / AUTHORITIES).read_bytes())
    _write(own / KEY, _pem_of_key(key))
    _write(own / CERTIFICATE, certificate.public_bytes(Encoding.PEM))
    _hand_out_revoked(folder)
    return own


def _add_to_revoked(folder: Path, certificate: Path) -> None:
    if not certificate.exists():
        raise NotFound(f"{certificate} is not there, so there is nothing to revoke")
    revoked = folder / REVOKED
    lines = revoked.read_bytes() if revoked.exists() else b""
    _write(revoked, lines + f"{fingerprint_of(certificate.read_bytes())}\n".encode())


def _hand_out_revoked(folder: Path) -> None:
    """Gives all identities the list, if there is one."""
    if (folder / REVOKED).exists():
        for own in folder.glob(f"*/{CERTIFICATE}"):
            _write(own.with_name(REVOKED), (folder / REVOKED).read_bytes())


def _load_authority(folder: Path) -> Authority:
    try:
        pem, key_pem = ((folder / name).read_bytes() for name in (AUTHORITIES, AUTHORITY_KEY))
    except OSError as error:
        raise NotFound(f"no authority in {folder}: `penstock certs init` makes one") from error
    try:
        certificate, key = x509.load_pem_x509_certificate(pem), load_pem_private_key(key_pem, None)
    except (ValueError, TypeError) as error:
        allowed = f"{AUTHORITIES} and {AUTHORITY_KEY} of `penstock certs init`"
        raise InvalidInput("folder", str(folder), allowed) from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
        return Authority(certificate, key)
    allowed = f"the key on P-256 of the first certificate of {AUTHORITIES} in {AUTHORITY_KEY}"
    raise InvalidInput("folder", str(folder), allowed)


def _hosts_of(path: Path) -> list[str]:
    """The hosts that a certificate names; none where there is no certificate."""
    if not path.exists():
        return []
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = names.get_values_for_type(x509.DNSName)
    hosts += map(str, names.get_values_for_type(x509.IPAddress))
    return [host for host in hosts if not host.endswith(DNS_SUFFIX)]


def _certify(
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    names: x509.SubjectAlternativeName,
    *,
    authority: Authority,
    days: int,
) -> x509.Certificate:
    subject = _subject(mesh=authority.mesh, name=name)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _builder(subject, issuer=authority.certificate.subject, public_key=public_key, days=days)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(names, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _subject(*, mesh: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, mesh),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _builder(
    subject: x509.Name, *, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _names(identity: Identity, hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(identity.uri),
        x509.DNSName(identity.dns_name),
    ]
    names += [_host_name(host) for host in dict.fromkeys((*LOOPBACK_HOSTS, *hosts))]
    return x509.SubjectAlternativeName(names)


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # Names of roles are not given away as names of machines.
    is_role = host.rstrip(".").lower().endswith(DNS_SUFFIX)
    if not host or is_role or not host.isascii() or any(c in "*:/ " for c in host):
        allowed = f"an IP address, or a host name without wildcards, not in {DNS_SUFFIX}"
        raise InvalidInput("host", host, allowed)
    return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes) -> None:
    """Replaces the file in one step; only its owner may read it."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    new.replace(path)
