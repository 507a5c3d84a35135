"""The observers of calls: metrics, fairness, traces, recordings and the request log share one interface."""

from collections.abc import Callable, Mapping
from typing import Protocol

from server.request.call import Ticket


class Asked(Protocol):
    """A request as received. headers: by lower-case name. client: the address it came from."""

    @property
    def headers(self) -> Mapping[bytes, bytes]: ...

    @property
    def client(self) -> str: ...


class Observer:
    """Hears of a call's beginning, of its place at a worker, and of its end. An observer overrides what it needs.

    Methods run on the event loop for every request: they take microseconds, raise nothing and do not block.
    """

    def began(self, ticket: Ticket, asked: Asked) -> None:
        """A call was read and waits from now on."""

    def got_place(self, ticket: Ticket) -> None:
        """The call has a place, `ticket.member`; once more for each other worker that is asked."""

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """The call is over, whether or not it started. outcome: "ok", "cancelled" or the code of its error."""


class Observers:
    """Those who hear of each event: the methods that observers override."""

    def __init__(self, *observers: Observer) -> None:
        self.began: list[Callable[[Ticket, Asked], None]] = []
        self.got_place: list[Callable[[Ticket], None]] = []
        self.ended: list[Callable[[Ticket, str], None]] = []
        for observer in observers:
            self.add(observer)

    def add(self, observer: Observer) -> None:
        """One more, from the next event on."""
        kind = type(observer)
        if kind.began is not Observer.began:
            self.began.append(observer.began)
        if kind.got_place is not Observer.got_place:
            self.got_place.append(observer.got_place)
        if kind.ended is not Observer.ended:
            self.ended.append(observer.ended)
