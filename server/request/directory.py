"""The current tenants by API key, from the tenant file and from the shared store."""

import hmac
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.request.errors import NoWorker, UnknownKey
from server.request.tenant_files import read_file
from server.request.tenants import OPEN, Tenant, TenantRecord, digest_of, digest_of_all, index_of

log = logging.getLogger("evenhand.tenants")

UNMETERED = "has a budget in money, but costs are not metered: set `cost: {meter: true}`"


@dataclass(slots=True)
class Tenants:
    """API key → tenant.

    wall: seconds since 1970. open: without any tenant anybody may ask, as the tenant `open`; that ends for good with
    the first tenant. learned: False until it is known whether the store has tenants.
    """

    wall: Callable[[], float]
    open: bool = True
    learned: bool = True
    from_file: tuple[TenantRecord, ...] = ()
    from_store: Mapping[str, TenantRecord] = field(default_factory=dict)
    _index: dict[bytes, TenantRecord] = field(default_factory=dict)
    _records: dict[str, TenantRecord] = field(default_factory=dict)
    _met: dict[str, Tenant] = field(default_factory=dict)
    _known: dict[bytes, tuple[Tenant, float | None]] = field(default_factory=dict)  # keys that came, by digest

    def identify(self, authorization: bytes | None, api_key: bytes | None) -> Tenant:
        """The tenant of a request's credentials. Raises UnknownKey; its message holds nothing of the key."""
        return self.holder(credential(authorization, api_key))

    def holder(self, digest: bytes) -> Tenant:
        """As `identify`, by what `credential` makes of a request's headers."""
        if self.open:
            return OPEN if self.learned else self._not_yet()
        keys = self._known
        known = keys.get(digest)
        if known is None:
            known = keys[digest] = self._key_of(digest)
        tenant, expires_at = known
        if expires_at is not None and expires_at <= self.wall():
            raise UnknownKey("This API key has expired: use the tenant's newer one.")
        return tenant

    def _key_of(self, digest: bytes) -> tuple[Tenant, float | None]:
        """The tenant of a key that comes for the first time, and when the key expires."""
        met = self._met
        if not digest:
            raise UnknownKey("No API key: send it as 'Authorization: Bearer KEY'.")
        record = self._index.get(digest)
        # The dictionary compares digests, whose leading bytes nobody can choose; this comparison is for certain.
        keys = () if record is None else record.credentials
        found = next((key for key in keys if hmac.compare_digest(key.digest, digest)), None)
        if record is None or found is None:
            if not self.learned:
                self._not_yet()
            raise UnknownKey("This API key is not known here.")
        return _of(record, met), found.expires_at

    def _not_yet(self) -> Tenant:
        raise NoWorker("The tenants are not known yet: the shared store has not answered.", retry_after_s=5.0)

    def set_file(self, records: tuple[TenantRecord, ...]) -> None:
        """The file's tenants, in place of those that it held before. A file, even an empty one, ends being open."""
        self.from_file = records
        self.open = False
        self._build()

    def set_stored(self, records: Mapping[str, TenantRecord]) -> None:
        """The store's tenants, in place of those before. Where the file has the same name or key, the file counts."""
        self.from_store = records
        self.learned = True
        if records:
            self.open = False
        self._build()

    def _build(self) -> None:
        in_file = self.names_in_file()
        from_store = [record for record in self.from_store.values() if record.name not in in_file]
        index = {key.digest: record for record in from_store for key in record.credentials}
        self._index = index | index_of(self.from_file)
        self._records = {record.name: record for record in (*self.from_file, *from_store)}
        # Last, and read first by whoever writes into them: while a thread is here, nothing old can get into these.
        self._met = {}
        self._known = {}

    def named(self, name: str) -> Tenant | None:
        """The tenant of this name that is in force."""
        met = self._met
        record = self._records.get(name)
        return None if record is None else _of(record, met)

    def record(self, name: str) -> TenantRecord | None:
        """The record of this name that is in force."""
        return self._records.get(name)

    def names_in_file(self) -> frozenset[str]:
        """The tenants that only the file can change."""
        return frozenset(record.name for record in self.from_file)

    def all(self) -> list[TenantRecord]:
        """Every tenant that is in force."""
        return list(self._records.values())


def _of(record: TenantRecord, met: dict[str, Tenant]) -> Tenant:
    """The tenant of a record, built when it first comes."""
    tenant = met.get(record.name)
    if tenant is None:
        tenant = met[record.name] = record.tenant()
    return tenant


def credential(authorization: bytes | None, api_key: bytes | None) -> bytes:
    """The digest of a request's key, empty if it has none."""
    key = api_key if authorization is None else bearer(authorization) or api_key
    return digest_of(key) if key else b""


def bearer(authorization: bytes) -> bytes | None:
    """The key of an Authorization header, None if it is not of the Bearer scheme."""
    if authorization[:7].lower() != b"bearer ":
        return None
    return authorization[7:].strip()


class TenantFile:
    """The tenant file, reread when it changes. A file that cannot be read changes nothing: the previous tenants stay in
    force."""

    def __init__(self, path: Path, tenants: Tenants, *, metered: bool = True) -> None:
        """Reads the file. ValueError if it is invalid: a gateway must not start with unintended tenants.

        metered: costs are counted here, so that a budget in money can be kept.
        """
        self.path = path
        self.tenants = tenants
        self.problem = ""
        self.digest = ""  # of the tenants in force
        self._metered = metered
        self._seen = self._mark()
        self._use(self._read())

    def _use(self, records: tuple[TenantRecord, ...]) -> None:
        self.tenants.set_file(records)
        self.digest = digest_of_all(records)

    def _read(self) -> tuple[TenantRecord, ...]:
        records = read_file(self.path)
        if not self._metered and (found := next((record for record in records if record.budget.in_money), None)):
            raise ValueError(f"tenant file {self.path}: tenant {found.name!r} {UNMETERED}")
        return records

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def changed(self) -> bool:
        """Whether the file is another than when it was last read."""
        return self._mark() != self._seen

    def look(self) -> None:
        """Reads the file if it changed. May run in a thread: requests see the old tenants or the new ones."""
        if not self.changed():
            return
        self._seen = self._mark()
        try:
            self._use(self._read())
        except ValueError as error:
            self.problem = f"{error}. The previous tenants stay in force."
            log.error("%s", self.problem)
        else:
            self.problem = ""
            log.info("tenant file %s: %d tenants", self.path, len(self.tenants.from_file))
