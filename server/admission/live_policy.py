"""The current policy, which can change while requests wait and run."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from scheduler.catalog import build
from scheduler.policy import Policy, window_for
from scheduler.tiers import TieredLanes
from scheduler.workers import Worker

log = logging.getLogger("evenhand.policy")


class ModelQueue(Protocol):
    """A waiting line whose policy may change."""

    @property
    def lanes(self) -> TieredLanes: ...

    def settle(self, now: float) -> None: ...
    def advance(self) -> None: ...


class LivePolicy:
    """Name and options of the policy of all lines; every line gets an instance of its own."""

    def __init__(self, name: str, options: Mapping[str, str], ahead: int | None, clock: Callable[[], float]) -> None:
        """ValueError if there is no such policy or option."""
        self._configured = (name, dict(options))
        self._ahead = ahead
        self._clock = clock
        self.on_switch: list[Callable[[], None]] = []
        self._set(name, options)

    def _set(self, name: str, options: Mapping[str, str]) -> None:
        policy = build(name, options)
        self.name, self.options = name, dict(options)
        self._beyond = window_for(policy, self._ahead)

    def order(self) -> tuple[str, tuple[str, ...]]:
        """Name and options as the plug-in inside an engine takes them."""
        return self.name, tuple(f"{name}={value}" for name, value in sorted(self.options.items()))

    def build(self) -> Policy:
        """The policy for one more line."""
        return build(self.name, self.options)

    def window(self, worker: Worker) -> int:
        """How many sequences a worker is given at a time."""
        return worker.slots + self._beyond

    def switch(self, name: str, options: Mapping[str, str], lines: Iterable[ModelQueue]) -> None:
        """Another policy for all lines from here on; nobody loses a place. ValueError, and no change, if none such."""
        if (name, dict(options)) == (self.name, self.options):
            return
        self._set(name, options)
        for callback in self.on_switch:
            callback()
        now = self._clock()
        for line in lines:
            line.settle(now)
            line.lanes.switch(self.build(), now)
            line.advance()
        log.warning("the policy is now %s%s", name, f", with {dict(options)}" if options else "")

    def as_configured(self, lines: Iterable[ModelQueue]) -> None:
        """The policy that the gateway was started with."""
        self.switch(*self._configured, lines)
