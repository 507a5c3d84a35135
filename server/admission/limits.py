"""A tenant's limits: requests and tokens per minute, requests at a time, tokens per day and month.

Decided on local state alone. With replicas each knows what the others spent up to the last exchange, and between two
rounds of exchanges gives out at most its share of what is left. So, with R replicas and a bucket of one minute:

- over any time t the tenant gets at most its rate * t + one bucket, as with one gateway;
- but for a burst that meets all replicas at once: before they have heard of each other they may together give out
  (1 - 1/R) of a bucket more, and at most one request each. It is paid back: the buckets go below zero.
- While the store is away each gives out 1/R of the rate.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import ClassVar, Protocol

import msgspec

from scheduler.jobs import Tier
from server.request.call import Call, Ticket
from server.request.errors import BadRequest, RateLimited, UnknownModel
from server.request.schemas import raw_members, splice
from server.request.tenants import Limits, Tenant
from server.request.tiers import TierCosts
from server.store.store import SLICE, Kept


class AtLimit(RateLimited):
    """A tenant is at one of its limits. reason: which, for metrics; `kind` and `code` are OpenAI's."""

    reason: ClassVar[str]


class TooManyRequests(AtLimit):
    kind = "requests"
    reason = "requests_per_minute"


class TooManyAtOnce(AtLimit):
    kind = "requests"
    reason = "concurrency"


class TooManyTokens(AtLimit):
    kind = "tokens"
    reason = "tokens_per_minute"


class QuotaExceeded(AtLimit):
    kind = "insufficient_quota"
    code = "insufficient_quota"
    reason = "budget"


class Headed(Protocol):
    """An answer that takes headers until it begins."""

    extra_headers: bytes


class Ring(Protocol):
    """What is known of the replicas: how many there are, and which round of exchanges this is."""

    count: int
    round: int


MONEY_UNITS = 1_000_000  # what is shared between gateways is whole numbers


class Alone:
    """There is one gateway."""

    count = 1
    round = 0


ALONE = Alone()


class Bucket:
    """A token bucket that holds a minute's worth, and this replica's share of it in the present round.

    level: what is left; below zero after others spent the same, or after an estimate was too low.
    share: what of it this replica may still give out before it hears of the others.
    """

    __slots__ = ("at", "burst", "level", "per_s", "round", "share")

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_s = per_minute / 60.0
        self.burst = self.level = self.share = per_minute
        self.at = now
        self.round = -1

    def resize(self, per_minute: float) -> None:
        self.per_s, self.burst = per_minute / 60.0, per_minute
        self.level = min(self.level, per_minute)

    def refill(self, now: float, ring: Ring) -> None:
        gained = (now - self.at) * self.per_s
        self.at = now
        self.level = min(self.burst, self.level + gained)
        if ring.count == 1:
            self.share = self.level
        elif ring.round != self.round:
            self.round = ring.round
            self.share = self.level / ring.count
        else:
            self.share = min(self.burst / ring.count, self.share + gained / ring.count)

    def lacks(self, amount: float) -> float:
        """Seconds until this amount may be taken; 0 if it may be now."""
        if self.level < amount:
            return (amount - self.level) / self.per_s
        return 0.0 if self.share > 0 else max(0.1, -self.share / self.per_s)

    def take(self, amount: float) -> None:
        self.level = min(self.burst, self.level - amount)
        self.share -= amount


_LINES = b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
_REQUEST_LINES = _LINES % ((b"requests",) * 3)
_TOKEN_LINES = _LINES % ((b"tokens",) * 3)
_BUDGETS = (  # in the order of `Gate._periods`
    ("tokens_per_day", 1),
    ("tokens_per_month", 1),
    ("cost_per_day", MONEY_UNITS),
    ("cost_per_month", MONEY_UNITS),
)


class LimitStanding:
    """One tenant's state. Rates and budgets may change under it; what was used stays used.

    spent_requests, spent_tokens: by this replica since it started. in_flight: here. elsewhere: at other replicas.
    free_round, free: how many more may be in flight here in this round.
    budgets: (which of `Gate._periods`, the most that may be used in it). used: in each period, at all replicas.
    """

    __slots__ = (
        "budgets", "elsewhere", "free", "free_round", "in_flight", "limits", "name", "prefix", "requests",
        "spent_requests", "spent_tokens", "tokens", "used",
    )  # fmt: skip

    def __init__(self, name: str, used: dict[str, int]) -> None:
        self.name = name
        self.limits = Limits()
        self.budgets: list[tuple[int, float]] = []
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.in_flight = 0
        self.elsewhere = 0
        self.free_round = -1
        self.free = 0
        self.spent_requests = 0
        self.spent_tokens = 0
        self.used = used

    def set_limits(self, limits: Limits, now: float) -> None:
        """The limits that hold from now on."""
        self.limits = limits
        self.budgets = [
            (number, most * unit)
            for number, (name, unit) in enumerate(_BUDGETS)
            if (most := getattr(limits, name)) is not None
        ]
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)

    def headers(self) -> bytes:
        """x-ratelimit-… as OpenAI sends them."""
        lines = b""
        for lines_for, bucket in ((_REQUEST_LINES, self.requests), (_TOKEN_LINES, self.tokens)):
            if bucket is not None:
                left, most = bucket.level, bucket.burst
                full_s = (most - left) / bucket.per_s
                full = b"%dms" % ceil(full_s * 1000) if 0.0 <= full_s < 1.0 else span(full_s)
                lines += lines_for % (most, left if 0 < left < most else max(0.0, min(left, most)), full)
        return lines

    def row(self) -> str:
        return f"{self.spent_requests} {self.spent_tokens} {self.in_flight}"

    def hear(self, requests: int, tokens: int, in_flight: int) -> None:
        """Adds what another replica has used since its last report."""
        if self.requests is not None:
            self.requests.level -= requests
        if self.tokens is not None:
            self.tokens.level = min(self.tokens.burst, self.tokens.level - tokens)
        self.elsewhere += in_flight


def _resized(bucket: Bucket | None, per_minute: float | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute)
    return bucket


def span(seconds: float) -> bytes:
    """A duration as OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1.0:
        return b"%dms" % max(0, ceil(seconds * 1000))
    minutes, rest = divmod(seconds, 60.0)
    text = b"%.2f" % rest if rest != int(rest) else b"%d" % rest
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return b"%dh%dm%bs" % (hours, minutes, text)
    return b"%dm%bs" % (minutes, text) if minutes else text + b"s"


def estimate(call: Call) -> int:
    """Tokens charged in advance: the prompt, and the most that the answer may have, as OpenAI counts them."""
    return call.prompt_tokens + call.max_tokens * call.sequences if call.route.generates else 0


def permitted(call: Call) -> Call:
    """The call, within what its tenant may ask for at all. UnknownModel for a model, BadRequest for a length."""
    tenant = call.tenant
    if tenant.models is not None and call.model not in tenant.models:
        raise UnknownModel(f"The model '{call.model[:100]}' does not exist or you have no access to it.", param="model")
    if tenant.max_tokens is None or not call.route.xargs:
        return call
    name = call.route.limit_fields[0]
    if call.max_tokens > tenant.max_tokens:
        members = raw_members(call.body)
        name = next(field for field in call.route.limit_fields if bytes(members.get(field, b"null")) != b"null")
        raise BadRequest(
            f"'{name}' is {call.max_tokens}; your tenant may ask for {tenant.max_tokens} at most.",
            param=name,
            code="max_tokens_too_high",
        )
    if call.max_tokens:
        return call
    members = raw_members(call.body)
    if any(bytes(members.get(field, b"null")) != b"null" for field in call.route.limit_fields):
        return call  # it asks for an output of 0 tokens, which is not the same as asking for no length
    return msgspec.structs.replace(
        call, body=splice(call.body, b'"%b":%d' % (name.encode(), tenant.max_tokens)), max_tokens=tenant.max_tokens
    )


class Gate:
    """Admits calls. One owner, one thread.

    clock: monotonic seconds. wall: seconds since 1970. named: tenants by name. replica: this gateway's own name.
    refusals: how many, by reason. costs: what a token counts for, by tier.
    """

    prefix = "limit:"

    def __init__(
        self,
        replica: str,
        named: Callable[[str], Tenant | None],
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        ring: Ring = ALONE,
        costs: TierCosts = TierCosts(),  # noqa: B008 - frozen
    ) -> None:
        self.refusals: Counter[str] = Counter()
        self.ring = ring
        self.costs = costs
        self._replica = replica
        self._named = named
        self._clock = clock
        self._wall = wall
        self._standings: dict[str, LimitStanding] = {}
        self._changed: set[str] = set()
        self._seen: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._kept: dict[Kept, int] = {}
        self._used: dict[str, dict[str, int]] = {}  # the sums of `_kept` over replicas, by tenant and period
        self._kept_changed: set[Kept] = set()
        self._over: set[str] = set()
        self._day_ends_at = 0.0
        self._day = self._month = self._cost_day = self._cost_month = ""
        self._periods: tuple[str, ...] = ()

    # calls
    def admit(self, ticket: Ticket, out: Headed) -> None:
        """Books a call of a tenant that has limits. AtLimit, and nothing booked, if the tenant is at one of them."""
        booked = estimate(ticket.call)
        if ticket.call.tier is not Tier.DEFAULT:
            booked = self.costs.of(booked, ticket.call.tier)
        ticket.standing = self.enter(ticket.call.tenant, booked, out)
        ticket.booked_tokens = booked

    def settle(self, ticket: Ticket) -> None:
        """A call is over: replaces what was booked for it by what it used. Usage is counted for tenants without limits
        too."""
        used = ticket.used_tokens()
        if ticket.call.tier is not Tier.DEFAULT:
            used = self.costs.of(used, ticket.call.tier)
        if ticket.standing is None:
            self.count(ticket.call.tenant.name, used)
        else:
            self.leave(ticket.standing, ticket.booked_tokens, used)

    def enter(self, tenant: Tenant, tokens: int, out: Headed) -> LimitStanding:
        """Books a call. Raises an AtLimit, having booked nothing. Both ways `out` gets its headers."""
        now = self._clock()
        standing = self._standing(tenant, now)
        refusal = self._refusal(standing, tokens, now)
        if refusal is None:
            self._book(standing, 1, tokens)
            standing.in_flight += 1
            standing.free -= 1
        out.extra_headers += standing.headers()
        if refusal is not None:
            raise refusal
        return standing

    def leave(self, standing: LimitStanding, reserved: int, used: int) -> None:
        """A call is over: replaces what was booked by what was used."""
        standing.in_flight -= 1
        standing.free += 1
        self._book(standing, 0, used - reserved)
        self.count(standing.name, used)

    def count(self, name: str, used: int) -> None:
        """A tenant used so many tokens, today and in this month."""
        if used:
            if self._wall() >= self._day_ends_at:
                self._turn_page()
            self._count(name, used, self._periods[:2])

    def spend(self, name: str, cost: float) -> None:
        """A tenant's request cost so much money."""
        if amount := round(cost * MONEY_UNITS):
            self._turn_page()
            self._count(name, amount, self._periods[2:])

    def _count(self, name: str, used: int, periods: tuple[str, ...]) -> None:
        totals = self._used_by(name)
        for period in periods:
            row = (period, name, self._replica)
            self._kept[row] = self._kept.get(row, 0) + used
            self._kept_changed.add(row)
            totals[period] = totals.get(period, 0) + used

    def _used_by(self, name: str) -> dict[str, int]:
        """What a tenant used in each period that is not over, at all replicas; the same object for good."""
        used = self._used.get(name)
        if used is None:
            used = self._used[name] = {}
        return used

    def _book(self, standing: LimitStanding, requests: int, tokens: int) -> None:
        standing.spent_requests += requests
        standing.spent_tokens += tokens
        if standing.requests is not None and requests:
            standing.requests.take(requests)
        if standing.tokens is not None and tokens:
            standing.tokens.take(tokens)
        self._changed.add(standing.name)

    def _standing(self, tenant: Tenant, now: float) -> LimitStanding:
        standing = self._standings.get(tenant.name)
        if standing is None:
            self._turn_page()
            standing = self._standings[tenant.name] = LimitStanding(tenant.name, self._used_by(tenant.name))
        if standing.limits is not tenant.limits and tenant.limits is not None:
            standing.set_limits(tenant.limits, now)
        for bucket in (standing.requests, standing.tokens):
            if bucket is not None:
                bucket.refill(now, self.ring)
        return standing

    def _refusal(self, standing: LimitStanding, tokens: int, now: float) -> AtLimit | None:
        refusal = (
            (self._over_budget(standing) if standing.budgets else None)
            or self._crowded(standing)
            or self._too_fast(standing, tokens)
        )
        if refusal is not None:
            self.refusals[refusal.reason] += 1
        return refusal

    def _over_budget(self, standing: LimitStanding) -> AtLimit | None:
        if self._wall() >= self._day_ends_at:
            self._turn_page()
        periods, used = self._periods, standing.used
        for number, most in standing.budgets:
            if used.get(periods[number], 0) >= most:
                name, unit = _BUDGETS[number]
                given = getattr(standing.limits, name)
                return self._spent(periods[number], f"{given} tokens" if unit == 1 else f"{given:.12g}")
        return None

    def _spent(self, period: str, most: str) -> QuotaExceeded:
        name = period.partition(":")[0].removeprefix("cost_")
        until = self._day_ends_at if name == "day" else _month_end(self._wall())
        return QuotaExceeded(f"You exceeded your budget of {most} a {name}.", retry_after_s=until - self._wall())

    def _crowded(self, standing: LimitStanding) -> AtLimit | None:
        most = standing.limits.concurrency
        if most is None:
            return None
        ring = self.ring
        left = most - standing.in_flight - standing.elsewhere
        if ring.count == 1:
            standing.free = left
        elif ring.round != standing.free_round:
            standing.free_round = ring.round
            standing.free = ceil(left / ring.count)
        if left > 0 and standing.free > 0:
            return None
        return TooManyAtOnce(f"Your limit of {most} requests at a time is reached.", retry_after_s=1.0)

    def _too_fast(self, standing: LimitStanding, tokens: int) -> AtLimit | None:
        requests, bucket = standing.requests, standing.tokens
        if (
            requests is not None
            and not (requests.level >= 1 and requests.share > 0)
            and (wait_s := requests.lacks(1)) > 0
        ):
            return TooManyRequests(
                f"Rate limit reached for requests per min (RPM): Limit {requests.burst:g}. "
                f"Please try again in {span(wait_s).decode()}.",
                retry_after_s=wait_s,
            )
        if bucket is None or (tokens <= bucket.level and bucket.share > 0):
            return None
        if tokens > bucket.burst:
            return TooManyTokens(
                f"Request too large for tokens per min (TPM): Limit {bucket.burst:g}, Requested {tokens}. "
                "Shorten the prompt, or ask for less with 'max_tokens'."
            )
        if (wait_s := bucket.lacks(tokens)) > 0:
            return TooManyTokens(
                f"Rate limit reached for tokens per min (TPM): Limit {bucket.burst:g}, "
                f"Used {max(0, round(bucket.burst - bucket.level))}, Requested {tokens}. "
                f"Please try again in {span(wait_s).decode()}.",
                retry_after_s=wait_s,
            )
        return None

    def _turn_page(self) -> None:
        """A new day: periods that are over count no more."""
        wall = self._wall()
        if wall < self._day_ends_at:
            return
        day = datetime.fromtimestamp(wall, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._day_ends_at = (day + timedelta(days=1)).timestamp()
        self._day, self._month = f"day:{day:%Y-%m-%d}", f"month:{day:%Y-%m}"
        self._cost_day, self._cost_month = f"cost_{self._day}", f"cost_{self._month}"
        self._periods = (self._day, self._month, self._cost_day, self._cost_month)
        present = self._present()
        # A replica whose clock is behind may still write into the day that has just ended: it is kept a little longer.
        self._over |= {period for period, _, _ in self._kept if period not in present}
        self._kept = {row: used for row, used in self._kept.items() if row[0] in present}
        self._kept_changed = {row for row in self._kept_changed if row[0] in present}
        for totals in self._used.values():
            for period in totals.keys() - present:
                del totals[period]

    def _present(self) -> set[str]:
        return set(self._periods)

    # replicas
    def changed(self, *, everything: bool) -> Iterator[tuple[str, str]]:
        names = list(self._standings if everything else self._changed)
        self._changed.clear()
        for name in names:
            if (standing := self._standings.get(name)) is not None:
                yield name, standing.row()

    def heard(self, rows: Mapping[str, Mapping[str, str]], from_zero: Collection[str]) -> Iterator[None]:
        now = self._clock()
        number = 0
        for replica, told in rows.items():
            for name, row in told.items():
                number += 1
                if number % SLICE == 0:
                    yield
                    now = self._clock()
                tenant = self._named(name)
                if tenant is not None and tenant.limits is not None:
                    requests, tokens, in_flight = map(int, row.split())
                    standing = self._standing(tenant, now)
                    was = self._seen.get((replica, name))
                    if was is None and replica in from_zero:
                        was = (0, 0, 0)
                    elif was is None:
                        was = (requests, tokens, 0)
                        self._begin_low(standing)
                    self._seen[replica, name] = (requests, tokens, in_flight)
                    standing.hear(requests - was[0], tokens - was[1], in_flight - was[2])

    def _begin_low(self, standing: LimitStanding) -> None:
        """What was spent before this replica came is not known: it begins with its share of each bucket."""
        for bucket in (standing.requests, standing.tokens):
            if bucket is not None:
                bucket.level = min(bucket.level, bucket.burst / self.ring.count)

    def gone(self, replica: str) -> None:
        for (owner, name), (requests, tokens, in_flight) in list(self._seen.items()):
            if owner == replica and in_flight:
                self._standings[name].elsewhere -= in_flight
                self._seen[owner, name] = (requests, tokens, 0)

    def forget(self, replica: str) -> None:
        self._seen = {row: seen for row, seen in self._seen.items() if row[0] != replica}

    def kept_changed(self, *, everything: bool) -> dict[Kept, int]:
        self._turn_page()
        rows = dict(self._kept) if everything else {row: self._kept[row] for row in self._kept_changed}
        self._kept_changed.clear()
        return rows

    def kept_heard(self, rows: dict[Kept, int]) -> None:
        self._turn_page()
        present = self._present()
        for row, used in rows.items():
            period, name, _ = row
            if period not in present:
                self._note_over(period)
                continue
            more = used - self._kept.get(row, 0)
            if more > 0:
                self._kept[row] = used
                totals = self._used_by(name)
                totals[period] = totals.get(period, 0) + more

    def _note_over(self, period: str) -> None:
        current = {name.partition(":")[0]: name for name in self._present()}
        if period < current.get(period.partition(":")[0], ""):
            self._over.add(period)

    def kept_over(self) -> Iterable[str]:
        """Periods that ended; named an hour late, for a replica whose clock is behind may still write into them."""
        if not self._over or self._wall() < self._day_ends_at - 23 * 3600:
            return ()
        over, self._over = self._over, set()
        return over

    def usage(self, name: str) -> dict[str, float]:
        """Tokens used in the present day and month, and what that cost where it is counted, for `/admin`."""
        self._turn_page()
        used: dict[str, float] = {self._day: 0, self._month: 0}
        used.update(self._used.get(name, {}))
        for period in used.keys() & {self._cost_day, self._cost_month}:
            used[period] /= MONEY_UNITS
        return used


def _month_end(wall: float) -> float:
    day = datetime.fromtimestamp(wall, UTC).replace(day=28, hour=0, minute=0, second=0, microsecond=0)
    return (day + timedelta(days=4)).replace(day=1).timestamp()
