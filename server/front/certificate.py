"""The certificate that clients see: read at the start, and again when it was renewed, without a restart."""

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger("evenhand.tls")

LOOK_S = 1.0


class ServerCertificate:
    """A certificate with its key, PEM files. key: None if it is in the same file."""

    def __init__(self, cert: Path, key: Path | None) -> None:
        """ValueError with a sentence for files that cannot be used."""
        self._cert, self._key = cert, key
        self._seen = self._stamps()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load(self.context)

    def look(self) -> None:
        """Takes a renewed certificate for connections from now on. One that cannot be used changes nothing."""
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # certificate and key may be written one by one
            self._load(self.context)
        except ValueError as error:
            log.error("%s; the previous certificate stays in use", error)
        else:
            log.info("reloaded the certificate in %s", self._cert)

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (OSError, ValueError) as error:
            files = " and ".join(str(file) for file in (self._cert, self._key) if file is not None)
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ValueError(f"{files}: no certificate with its key in PEM format ({why})") from None

    def _stamps(self) -> list[tuple[int, int]]:
        """What changes with the files; those that Kubernetes replaces are links to others."""
        files = (self._cert, *([] if self._key is None else [self._key]))
        return [(file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else (0, 0) for file in files]


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise ValueError("the key is encrypted: decrypt it, and let only this user read it")
