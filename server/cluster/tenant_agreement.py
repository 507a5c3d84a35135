"""Checks that all gateways of a store have the same tenant file; a difference is reported, and service continues."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping

log = logging.getLogger("evenhand.tenants")

PATIENCE_S = 10.0  # a new file reaches gateways one after the other
_NAMED = 5  # replicas in a line of the log
_ROW = "file"


class TenantAgreement:
    """Tells the replicas a digest of this gateway's tenant file, and compares theirs with it; a `Part` of `Replicas`.

    digest: of the file in force; empty for none.
    """

    prefix = "tenants:"

    def __init__(self, digest: Callable[[], str], clock: Callable[[], float]) -> None:
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
                log.info("all gateways of the store have the same tenant file again")
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
        """A sentence once other gateways have had another file for `PATIENCE_S`, else empty."""
        others = self._others()
        if not others or self._since is None or self._clock() - self._since < PATIENCE_S:
            return ""
        have = "1 other gateway has" if len(others) == 1 else f"{len(others)} other gateways have"
        return (
            f"{have} a different tenant file, so a key or a limit may be valid at one gateway and not at another: "
            "give all gateways the same file."
        )

    def _others(self) -> list[str]:
        """The replicas whose file is another than ours."""
        mine = self._digest()
        return sorted(replica for replica, digest in self._theirs.items() if digest != mine)
