"""How a worker lets itself be asked: the key that it wants, and the certificates by which the two know each other."""

import logging
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from server.request.errors import EngineUntrusted

log = logging.getLogger("evenhand.engine")

_KEY = re.compile(r"[\x21-\x7e]{1,4096}")  # what may stand in a header, and is no space
# OpenSSL's X509_V_ERR_…: what they mean to somebody who set up a worker.
_EXPIRED, _NOT_YET_VALID = 10, 9
_UNKNOWN_ISSUER = frozenset((2, 18, 19, 20, 21))
_OTHER_NAME = frozenset((62, 64))


@dataclass(frozen=True, slots=True)
class Access:
    """What a worker is asked with.

    key: sent as `Authorization: Bearer KEY`; never shown. ca: PEM file of those who may have signed the worker's
    certificate, instead of the system's. cert, cert_key: PEM files of the gateway's own certificate, for a worker that
    asks for one; `cert_key` may be empty if `cert` holds the key as well.
    """

    key: str = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    cert_key: str = ""

    def __post_init__(self) -> None:
        if self.key and not _KEY.fullmatch(self.key):
            raise ValueError("its key has characters that no HTTP header can carry")
        if self.cert_key and not self.cert:
            raise ValueError("cert_key needs a certificate: give cert too")

    @property
    def for_tls(self) -> bool:
        """Whether it says anything about certificates."""
        return bool(self.ca or self.cert)

    def or_tls_of(self, other: "Access") -> "Access":
        """This one, with the other's certificates where it names none."""
        return self if self.for_tls else Access(self.key, other.ca, other.cert, other.cert_key)


class ClientTls:
    """The TLS context towards one worker, made anew when one of its files has changed."""

    def __init__(self, access: Access) -> None:
        """ValueError with a sentence for a file that cannot be used."""
        self._access = access
        self._files = [Path(name) for name in (access.ca, access.cert, access.cert_key) if name]
        self._context = self._made()
        self._seen = self._stamps()

    def context(self) -> ssl.SSLContext:
        """The context for one more connection. A file that has become unusable changes nothing, and is logged once."""
        if self._files and (stamps := self._stamps()) != self._seen:
            self._seen = stamps
            try:
                self._context = self._made()
            except ValueError as error:
                log.error("%s; the previous files stay in use", error)
        return self._context

    def _stamps(self) -> list[int]:
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in self._files]

    def _made(self) -> ssl.SSLContext:
        access = self._access
        try:
            context = ssl.create_default_context(cafile=access.ca or None)
        except (OSError, ValueError) as error:
            raise ValueError(f"the file {access.ca} holds no CA certificates in PEM format: {_short(error)}") from None
        if access.cert:
            try:
                context.load_cert_chain(access.cert, access.cert_key or None)
            except (OSError, ValueError) as error:
                files = " and ".join(filter(None, (access.cert, access.cert_key)))
                raise ValueError(f"{files} is not a certificate with its key in PEM format: {_short(error)}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        return context


def _short(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def untrusted(error: BaseException | None) -> EngineUntrusted | None:
    """What is wrong between two certificates, if that is why a connection failed."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return EngineUntrusted(_what_is_wrong(error))
        error = error.__cause__ or error.__context__
    return None


def _what_is_wrong(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _unverified(error)
    reason = (error.reason or "").replace("_", " ").lower()
    if "certificate required" in reason or "handshake failure" in reason:
        return "The worker requires a client certificate: give one with cert=FILE."
    if "alert" in reason:
        return f"The worker does not accept the gateway's certificate ({reason}): check cert=FILE."
    if "wrong version number" in reason or "packet length too long" in reason or "record layer" in reason:
        return "The worker does not speak TLS: write its URL with http://, or give the worker a certificate."
    return f"TLS with the worker fails: {reason or 'no reason given'}."


def _unverified(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "The worker's certificate has expired: renew it."
    if code == _NOT_YET_VALID:
        return "The worker's certificate is not valid yet: compare the two machines' clocks."
    if code in _OTHER_NAME:
        return "The worker's certificate is for another host: use one of its names in the worker's URL."
    if code in _UNKNOWN_ISSUER:
        return "The worker's certificate is signed by a CA that this gateway does not trust: give the CA with ca=FILE."
    return f"The worker's certificate is not accepted: {error.verify_message}."
