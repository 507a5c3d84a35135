"""Who is charged and limited: tenants, found by their API keys, from a YAML file and from the store's records."""

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.request.errors import NoWorker, UnknownKey

log = logging.getLogger("evenhand.tenants")

MIN_KEY_CHARACTERS = 16
HASHED = "sha256:"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None: as much as there is.

    requests_per_minute, tokens_per_minute: token buckets that hold one minute's worth.
    concurrency: requests waiting or running at a time.
    tokens_per_day, tokens_per_month: budgets, by UTC calendar.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks.

    name: shown in metrics and used as the scheduler's tenant.
    weight: its share of the engines against others' (1 is the default).
    grants: request fields that steer the engine and that this tenant may use all the same.
    models: the models it may use, None for all.
    max_tokens: the longest output of one request, in tokens; None for no bound of ours.
    limits: None if it has none.
    """

    name: str
    weight: float = 1.0
    grants: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    max_tokens: int | None = None
    limits: Limits | None = None


OPEN = Tenant(name="open")


def digest_of(key: bytes) -> bytes:
    """What is kept of a key.

    SHA-256 and not scrypt: a key is 256 random bits and not a password, so there is no dictionary to slow down, and a
    slow hash on every request would only help those who send many wrong keys.
    """
    return hashlib.sha256(key).digest()


def hashed(key: str) -> str:
    """The key as a tenant file may hold it. ValueError if it is too short to be random."""
    if len(key) < MIN_KEY_CHARACTERS:
        raise ValueError(
            f"a key needs {MIN_KEY_CHARACTERS} characters or more: it is hashed fast, so it must be random"
        )
    return HASHED + digest_of(key.encode()).hex()


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return "eh-" + token_urlsafe(32)


def key_id(text: str) -> str:
    """The name of a hashed key: the first 8 hexadecimal digits of its digest."""
    return text.removeprefix(HASHED)[:8]


def _hashed_if_plain(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError("a key is a text")
    if not text.startswith(HASHED):
        return hashed(text)
    if len(text) != len(HASHED) + 64 or not all(letter in "0123456789abcdef" for letter in text[len(HASHED) :]):
        raise ValueError(f"what follows {HASHED} must be 64 lower-case hexadecimal digits")
    return text


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("this is a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]


class _Strict(BaseModel):
    # Without the input in its errors: the input may be a key.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class KeyRecord(_Strict):
    """One key of a tenant. `key` plain or `sha256:…`; only the hash is kept. `expires`: refused from then on."""

    key: Annotated[str, BeforeValidator(_hashed_if_plain)]
    expires: datetime | None = None


def _key_record(value: Any) -> Any:
    return {"key": value} if isinstance(value, str) else value


class BudgetRecord(_Strict):
    """Token budgets by UTC calendar."""

    tokens_per_day: Whole | None = Field(None, ge=0)
    tokens_per_month: Whole | None = Field(None, ge=0)


class TenantRecord(_Strict):
    """A tenant as the file and `/admin` write it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    keys: tuple[Annotated[KeyRecord, BeforeValidator(_key_record)], ...] = ()
    weight: Number = Field(1.0, gt=0, allow_inf_nan=False)
    requests_per_minute: Number | None = Field(None, gt=0)
    tokens_per_minute: Number | None = Field(None, gt=0)
    concurrency: Whole | None = Field(None, ge=1)
    models: frozenset[str] | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    budget: BudgetRecord = BudgetRecord()
    grants: frozenset[str] = frozenset()

    def tenant(self) -> Tenant:
        """The record as the gateway uses it."""
        limits = Limits(
            self.requests_per_minute,
            self.tokens_per_minute,
            self.concurrency,
            self.budget.tokens_per_day,
            self.budget.tokens_per_month,
        )
        return Tenant(
            self.name,
            self.weight,
            self.grants,
            self.models,
            self.max_tokens,
            None if limits == Limits() else limits,
        )


class _TenantFile(_Strict):
    tenants: tuple[TenantRecord, ...]


def read_record(value: Any) -> TenantRecord:
    """A tenant from parsed JSON. ValueError with a sentence that quotes no input, for that may be a key."""
    try:
        return TenantRecord.model_validate(value)
    except ValidationError as error:
        raise ValueError(_sentences(error)) from None


def read_file(path: Path) -> tuple[TenantRecord, ...]:
    """The tenants of a file. ValueError with a sentence if it is missing, no YAML, or wrong."""
    try:
        parsed = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"tenant file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"tenant file {path} is not UTF-8") from None
    except yaml.YAMLError as error:
        # The error's own text quotes the line, and the line may hold a key.
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"tenant file {path}{f', line {mark.line + 1}' if mark else ''}: this is no YAML") from None
    try:
        records = _TenantFile.model_validate(parsed).tenants
        index_of(records)
    except ValidationError as error:
        raise ValueError(f"tenant file {path}: {_sentences(error)}") from None
    except ValueError as error:
        raise ValueError(f"tenant file {path}: {error}") from None
    return records


def _sentences(error: ValidationError) -> str:
    said = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"])
        said.append(f"{where or 'tenant'}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(said)


@dataclass(frozen=True, slots=True)
class Credential:
    """A key that opens, and whose it is. expires_at: seconds since 1970, None for never."""

    digest: bytes
    tenant: Tenant
    expires_at: float | None


def index_of(records: Iterable[TenantRecord]) -> dict[bytes, Credential]:
    """Digest → credential. ValueError for a name or a key that stands there twice."""
    index: dict[bytes, Credential] = {}
    names: set[str] = set()
    for record in records:
        if record.name in names:
            raise ValueError(f"tenant {record.name!r} stands there twice")
        names.add(record.name)
        tenant = record.tenant()
        for key in record.keys:
            digest = bytes.fromhex(key.key.removeprefix(HASHED))
            if digest in index:
                raise ValueError(f"key {key_id(key.key)} of tenant {record.name!r} stands there twice")
            index[digest] = Credential(digest, tenant, _seconds(key.expires))
    return index


def _seconds(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


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
    _index: dict[bytes, Credential] = field(default_factory=dict)
    _named: dict[str, Tenant] = field(default_factory=dict)

    def identify(self, authorization: bytes | None, api_key: bytes | None) -> Tenant:
        """The tenant of a request's credentials. Raises UnknownKey; its message holds nothing of the key."""
        if self.open:
            return OPEN if self.learned else self._not_yet()
        key = bearer(authorization) or api_key
        if not key:
            raise UnknownKey("No API key: send it as 'Authorization: Bearer KEY'.")
        digest = digest_of(key)
        found = self._index.get(digest)
        # The dictionary compares digests, whose leading bytes nobody can choose; this comparison is for certain.
        if found is None or not hmac.compare_digest(found.digest, digest):
            if not self.learned:
                self._not_yet()
            raise UnknownKey("This API key is not known here.")
        if found.expires_at is not None and found.expires_at <= self.wall():
            raise UnknownKey("This API key has expired: use the tenant's newer one.")
        return found.tenant

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
        index = index_of(self.from_file)
        for record in self.from_store.values():
            if record.name not in self.names_in_file():
                index = index_of((record,)) | index
        self._index = index
        self._named = {record.name: record.tenant() for record in self.all()}

    def named(self, name: str) -> Tenant | None:
        """The tenant of this name that is in force."""
        return self._named.get(name)

    def names_in_file(self) -> frozenset[str]:
        """The tenants that only the file can change."""
        return frozenset(record.name for record in self.from_file)

    def all(self) -> list[TenantRecord]:
        """Every tenant that is in force."""
        named = self.names_in_file()
        return [*self.from_file, *(record for record in self.from_store.values() if record.name not in named)]


def bearer(authorization: bytes | None) -> bytes | None:
    """The key of an Authorization header, None if it is not of the Bearer scheme."""
    if authorization is None or authorization[:7].lower() != b"bearer ":
        return None
    return authorization[7:].strip()


class TenantFile:
    """The file, read anew when it changed. What cannot be read changes nothing: the tenants before stay in force."""

    def __init__(self, path: Path, tenants: Tenants) -> None:
        """Reads it. ValueError if that cannot be: a gateway does not start with tenants that nobody meant."""
        self.path = path
        self.tenants = tenants
        self.problem = ""
        self._seen = self._mark()
        tenants.set_file(read_file(path))

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def look(self) -> None:
        """Reads the file if it is another than when it was last looked at. Call it once a second."""
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self.tenants.set_file(read_file(self.path))
        except ValueError as error:
            self.problem = f"{error}. The tenants before stay in force."
            log.error("%s", self.problem)
        else:
            self.problem = ""
            log.info("tenant file %s: %d tenants", self.path, len(self.tenants.from_file))
