"""The certificate, key and authorities that a process shows and trusts, read from its folder.

`FOLDER/cert.pem`, `key.pem`, `ca.pem`, as `penstock certs` writes them. Whoever replaces the files
(renews the certificate, adds an authority) restarts nothing: a server looks at them before each
handshake, a channel when it is opened, and links are dialled again with new channels. What is
connected stays so. Files that do not fit together, such as those half replaced, are passed over:
the last that did are good for a while.

`FOLDER/revoked.txt`, where there is one, has the fingerprints of certificates that call nothing any
more, whoever signed them. Servers look at it before each call.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

from core.errors import InvalidInput, NotFound, Unavailable
from services.common.identity import Identity

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_LOG = logging.getLogger(__name__)
CERTIFICATE, KEY, AUTHORITIES = "cert.pem", "key.pem", "ca.pem"
REVOKED = "revoked.txt"
# How long what `penstock certs` makes is valid.
AUTHORITY_DAYS = 3650
IDENTITY_DAYS = 90


class _Files(NamedTuple):
    certificate: bytes
    key: bytes
    authorities: bytes


class Credentials:
    """What one folder holds; the identity stays the same as long as the process lives."""

    def __init__(self, folder: Path) -> None:
        """Raises NotFound, or InvalidInput where the files are of no use, expired say."""
        self._folder = folder
        self._files = _read(folder)
        self.identity = _identity_of(self._files, folder)

    def of_server(self, *, asks_clients: bool = True) -> grpc.ServerCredentials:
        """For a port; with `asks_clients`, nobody without a certificate gets past the handshake."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._files),
            lambda: _configuration(self._current()),  # before each handshake, on gRPC's thread
            require_client_authentication=asks_clients,
        )

    def of_channel(self) -> grpc.ChannelCredentials:
        """For a channel that is opened now."""
        files = self._current()
        return grpc.ssl_channel_credentials(files.authorities, files.key, files.certificate)

    def have_revoked(self, certificate_pem: bytes) -> bool:
        """Whether the folder's list has the certificate; raises Unavailable where it cannot be
        read: better nobody than somebody who was shut out."""
        try:
            revoked = (self._folder / REVOKED).read_text().split()
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise Unavailable(f"{REVOKED} cannot be read, so nobody is let in") from error
        return fingerprint_of(certificate_pem) in revoked

    def _current(self) -> _Files:
        """The folder's files as they are, or as they last were of use."""
        try:
            self._read_again()
        except (InvalidInput, NotFound) as error:
            _LOG.error("certificates passed over", extra={"why": str(error)})
        return self._files

    def _read_again(self) -> None:
        files = _read(self._folder)
        if files == self._files:
            return
        identity = _identity_of(files, self._folder)
        if identity != self.identity:
            allowed = f"{self.identity.uri}, as when the process started"
            raise InvalidInput("certs", identity.uri, allowed)
        _LOG.info("certificates replaced", extra={"identity": identity.uri})
        self._files = files


def load_credentials(folder: Path | None, *, kind: str) -> Credentials | None:
    """Those of a process that was told a folder, for a role of this kind, such as "stage".

    Raises NotFound, InvalidInput.
    """
    if folder is None:
        return None
    credentials = Credentials(folder.expanduser())
    if credentials.identity.kind != kind:
        raise InvalidInput("certs", credentials.identity.uri, f"the identity of a {kind}")
    return credentials


def credentials_of_client(ca: Path) -> grpc.ChannelCredentials:
    """For a client that shows no certificate, and trusts these authorities; raises NotFound."""
    return grpc.ssl_channel_credentials(_read_file(ca.expanduser()))


def fingerprint_of(certificate_pem: bytes) -> str:
    """SHA-256 of the certificate, in hex."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate_pem.decode())).hexdigest()


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    pairs = [(files.key, files.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=files.authorities)


def _read(folder: Path) -> _Files:
    return _Files(*(_read_file(folder / name) for name in (CERTIFICATE, KEY, AUTHORITIES)))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"{path} cannot be read ({error.strerror}): see `penstock certs`") from error


def _identity_of(files: _Files, folder: Path) -> Identity:
    """Whom the files make their holder; raises InvalidInput where they do not belong together."""
    # Imported here: takes 60 ms, of which processes without certificates need not know.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate(files.certificate)
        authorities = x509.load_pem_x509_certificates(files.authorities)
        key = load_pem_private_key(files.key, password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        allowed = f"{CERTIFICATE}, {KEY} and {AUTHORITIES} of `penstock certs`"
        raise InvalidInput("certs", str(folder), allowed) from error
    if key.public_key() != certificate.public_key():
        raise InvalidInput("certs", str(folder), f"a {KEY} that belongs to {CERTIFICATE}")
    if not any(_is_signed(certificate, by=authority) for authority in authorities):
        raise InvalidInput("certs", str(folder), f"a {CERTIFICATE} signed by one of {AUTHORITIES}")
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        period = f"{certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
        raise InvalidInput("certs", f"{folder}, valid {period}", "a certificate that is valid now")
    return Identity.from_uri(uri)


def _is_signed(certificate: Certificate, *, by: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
