"""Tenant records as operators write them, in a file or at `/admin`; small, since there may be a hundred thousand."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from secrets import token_urlsafe
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from scheduler.jobs import Tier
from scheduler.tiers import BY_NAME

MIN_KEY_CHARACTERS = 16
HASHED = "sha256:"


USUAL_TIERS = frozenset((Tier.DEFAULT, Tier.FLEX))
TierName = Literal["default", "flex", "priority"]
_USUAL_NAMES: frozenset[TierName] = frozenset(("default", "flex"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None: as much as there is.

    requests_per_minute, tokens_per_minute: token buckets that hold one minute's worth.
    concurrency: requests waiting or running at a time.
    tokens_per_day, tokens_per_month: budgets, by UTC calendar. cost_per_day, cost_per_month: likewise, in money.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    cost_per_day: float | None = None
    cost_per_month: float | None = None


Above0 = Annotated[float, Meta(gt=0)]


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Objectives of a tenant's streams, in seconds; None: the model's. ttft_s: first token. tpot_s: each later one."""

    ttft_s: Above0 | None = None
    tpot_s: Above0 | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks.

    name: shown in metrics and used as the scheduler's tenant.
    weight: its share of the engines against others' (1 is the default).
    grants: request fields that steer the engine and that this tenant may use all the same.
    models: the models it may use, None for all.
    max_tokens: the longest output of one request, in tokens; None for no bound of ours.
    limits: None if it has none.
    secret: what nobody else can guess, the hash of its oldest key.
    slo: its own objectives, None for the model's.
    tiers: the service tiers that it may ask for. usual_tier: of its requests that ask for none.
    """

    name: str
    weight: float = 1.0
    grants: frozenset[str] = frozenset()
    models: frozenset[str] | None = None
    max_tokens: int | None = None
    limits: Limits | None = None
    secret: str = field(default="", repr=False)
    slo: Slo | None = None
    tiers: frozenset[Tier] = USUAL_TIERS
    usual_tier: Tier = Tier.DEFAULT

    @property
    def cache_salt(self) -> str:
        """Keeps its prefixes in engines' caches apart from others'. The same at every gateway that knows the tenant."""
        return hmac.digest(self.secret.encode(), b"cache salt " + self.name.encode(), "sha256").hex()[:32]


OPEN = Tenant(name="open", tiers=frozenset(Tier))


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


AtLeast1 = Annotated[int, Meta(ge=1)]
AtLeast0 = Annotated[int, Meta(ge=0)]
Money = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _hashed_if_plain(text: str) -> str:
    if not text.startswith(HASHED):
        return hashed(text)
    if len(text) != len(HASHED) + 64 or not all(letter in "0123456789abcdef" for letter in text[len(HASHED) :]):
        raise ValueError(f"what follows {HASHED} must be 64 lower-case hexadecimal digits")
    return text


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False, omit_defaults=False):
    """A record that refuses what it does not know. Its errors name the field and never quote it: it may be a key."""


class KeyRecord(_Strict, frozen=True, gc=False):
    """One key of a tenant. `key` plain or `sha256:…`; only the hash is kept. `expires`: refused from then on."""

    key: str
    expires: datetime | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "key", _hashed_if_plain(self.key))

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.key.removeprefix(HASHED))

    @property
    def expires_at(self) -> float | None:
        """Seconds since 1970, None for never. A time without a zone is in UTC."""
        moment = self.expires
        if moment is None:
            return None
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


class BudgetRecord(_Strict, frozen=True, gc=False):
    """Budgets by UTC calendar: in tokens, and in the currency of the prices."""

    tokens_per_day: AtLeast0 | None = None
    tokens_per_month: AtLeast0 | None = None
    cost_per_day: Money | None = None
    cost_per_month: Money | None = None

    @property
    def in_money(self) -> bool:
        """Whether it can only be kept where costs are counted."""
        return self.cost_per_day is not None or self.cost_per_month is not None


NO_BUDGET = BudgetRecord()


class TenantRecord(_Strict, frozen=True, gc=False):
    """A tenant as the file and `/admin` write it. In `keys`, a text stands for a key that does not expire."""

    name: Name
    keys: tuple[str | KeyRecord, ...] = ()
    weight: Above0 = 1.0
    requests_per_minute: Above0 | None = None
    tokens_per_minute: Above0 | None = None
    concurrency: AtLeast1 | None = None
    models: frozenset[str] | None = None
    max_tokens: AtLeast1 | None = None
    budget: BudgetRecord = NO_BUDGET
    grants: frozenset[str] = frozenset()
    tiers: frozenset[TierName] = _USUAL_NAMES
    slo: Slo | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise ValueError(f"{name} must be a finite number")
        if not self.tiers:
            raise ValueError("tiers must name at least one tier")
        keys = tuple(KeyRecord(key) if isinstance(key, str) else key for key in self.keys)
        msgspec.structs.force_setattr(self, "keys", keys)
        if self.budget == NO_BUDGET:
            msgspec.structs.force_setattr(self, "budget", NO_BUDGET)  # one object for all

    @property
    def credentials(self) -> tuple[KeyRecord, ...]:
        """The keys, each as a record."""
        return self.keys  # type: ignore[return-value]  # `__post_init__` has made records of the texts

    def described(self) -> dict[str, Any]:
        """The record without its keys, as JSON has it."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        del told["keys"]
        return told | {name: sorted(told[name]) for name in ("models", "grants", "tiers") if told[name] is not None}

    def tenant(self) -> Tenant:
        """The record as the gateway uses it."""
        limits = Limits(
            self.requests_per_minute,
            self.tokens_per_minute,
            self.concurrency,
            self.budget.tokens_per_day,
            self.budget.tokens_per_month,
            self.budget.cost_per_day,
            self.budget.cost_per_month,
        )
        tiers = USUAL_TIERS if self.tiers == _USUAL_NAMES else frozenset(BY_NAME[name] for name in self.tiers)
        return Tenant(
            self.name,
            self.weight,
            self.grants,
            self.models,
            self.max_tokens,
            None if limits == Limits() else limits,
            self.credentials[0].key if self.keys else "",
            self.slo,
            tiers,
            Tier.DEFAULT if Tier.DEFAULT in tiers else max(tiers),
        )


_encode_in_order = msgspec.json.Encoder(order="deterministic").encode  # a set has no order of its own


def read_record(value: Any) -> TenantRecord:
    """A tenant from parsed JSON or YAML. ValueError with a sentence that quotes no input, for that may be a key."""
    try:
        return msgspec.convert(value, TenantRecord)
    except msgspec.ValidationError as error:
        raise ValueError(sentence(error)) from None


def sentence(error: msgspec.ValidationError, within: str = "") -> str:
    """`Expected `float` > 0 - at `$.tenants[3].weight`` → `tenants[3].weight: expected `float` > 0`; `within`: where
    what was read stands itself."""
    said, _, where = str(error).partition(" - at `$")
    where = (within + where.rstrip("`")).lstrip(".") or "tenant"
    if said.startswith("Object contains unknown field `"):
        return f"{where}.{said.split('`')[1]}: there is no such field"
    return f"{where}: {said[:1].lower()}{said[1:]}"


def index_of(records: Iterable[TenantRecord]) -> dict[bytes, TenantRecord]:
    """Digest of a key → its tenant's record. ValueError for a name or a key that is used twice."""
    index: dict[bytes, TenantRecord] = {}
    names: set[str] = set()
    for record in records:
        if record.name in names:
            raise ValueError(f"two tenants are named {record.name!r}")
        names.add(record.name)
        for key in record.credentials:
            if key.digest in index:
                raise ValueError(f"key {key_id(key.key)} of tenant {record.name!r} belongs to another tenant, too")
            index[key.digest] = record
    return index


def digest_of_all(records: Iterable[TenantRecord]) -> str:
    """The same for the same tenants, in whatever order and notation they were written; another for any others."""
    digest = hashlib.sha256()
    for text in sorted(_encode_in_order(_in_one_notation(record)) for record in records):
        digest.update(text)
    return digest.hexdigest()


def _in_one_notation(record: TenantRecord) -> TenantRecord | tuple[TenantRecord, list[tuple[str, float | None]]]:
    """A record with one plain key as it is; of any other its keys in order, with moments rather than dates in
    somebody's time zone."""
    if len(record.keys) <= 1 and all(isinstance(key, str) for key in record.keys):
        return record
    keys = sorted((key.key, key.expires_at) for key in record.credentials)
    return msgspec.structs.replace(record, keys=()), keys
