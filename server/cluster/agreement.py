"""Checks that gateways of one store were configured alike; a difference is reported, and service continues."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

log = logging.getLogger("evenhand.agreement")

PATIENCE_S = 10.0  # what is changed everywhere reaches gateways one after the other
_NAMED = 5  # replicas in a line of the log
_ROW = "is"


@dataclass(frozen=True, slots=True)
class Subject:
    """What gateways must have in common, and the words for it.

    prefix: of its rows. differs: what others have. advice: what follows, and what to do.
    same: said when they agree again.
    """

    prefix: str
    differs: str
    advice: str
    same: str


TENANT_FILE = Subject(
    "tenants:",
    "a different tenant file",
    "so a key or a limit may be valid at one gateway and not at another: give all gateways the same file",
    "the same tenant file",
)
REDIS_SERVERS = Subject(
    "servers:",
    "a different list of Redis servers",
    "so they share only a part of what they should: give all gateways the same --redis-url, in the same order",
    "the same list of Redis servers",
)


class Agreement:
    """Tells the replicas a digest of what this gateway has, and compares theirs with it; a `Part` of `Replicas`.

    digest: of what is in force here; empty for nothing.
    """

    def __init__(self, subject: Subject, digest: Callable[[], str], clock: Callable[[], float]) -> None:
        self.prefix = subject.prefix
        self._subject = subject
        self._digest = digest
        self._clock = clock
        self._told: str | None = None
        self._theirs: dict[str, str] = {}
        self._since: float | None = None
        self._logged = False

    def changed(self, *, everything: bool) -> Iterator[tuple[str, str]]:
        digest = self._digest()
        if digest != self._told or everything:
            self._told = digest
            yield _ROW, digest

    def heard(self, rows: Mapping[str, Mapping[str, str]], from_zero: Collection[str]) -> Iterator[None]:
        yield
        self._theirs.update({replica: own[_ROW] for replica, own in rows.items() if _ROW in own})
        others = self._others()
        if not others:
            if self._logged:
                log.info("all gateways of the store have %s again", self._subject.same)
            self._since, self._logged = None, False
            return
        if self._since is None:
            self._since = self._clock()
        if not self._logged and self._clock() - self._since >= PATIENCE_S:
            self._logged = True
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            log.error("%s They are %s%s.", self.problem(), ", ".join(others[:_NAMED]), more)

    def gone(self, replica: str) -> None:
        self._theirs.pop(replica, None)

    def forget(self, replica: str) -> None:
        self.gone(replica)

    def problem(self) -> str:
        """A sentence once others have had something else for `PATIENCE_S`, else empty."""
        others = self._others()
        if not others or self._since is None or self._clock() - self._since < PATIENCE_S:
            return ""
        have = "1 other gateway has" if len(others) == 1 else f"{len(others)} other gateways have"
        return f"{have} {self._subject.differs}, {self._subject.advice}."

    def _others(self) -> list[str]:
        """The replicas that have something else."""
        mine = self._digest()
        return sorted(replica for replica, digest in self._theirs.items() if digest != mine)
