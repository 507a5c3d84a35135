"""Who hears of each call: metrics, fairness, traces, recordings and the request log share one interface."""

from collections.abc import Callable

from server.request.call import Ticket


class Observer:
    """Hears of a call's beginning, start and end. An observer overrides what it needs.

    Methods run on the event loop for every request: they take microseconds, raise nothing and do not block.
    """

    def began(self, ticket: Ticket, traceparent: bytes | None) -> None:
        """A call was read and waits from now on. traceparent: the client's own header, if it sent one."""

    def started(self, ticket: Ticket) -> None:
        """The call has a place at a worker; its ticket moves on in the same step."""

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """The call is over, whether or not it started. outcome: "ok", "cancelled" or the code of its error."""


class Observers(Observer):
    """Several observers as one. Only methods that an observer overrides are called."""

    def __init__(self, *observers: Observer) -> None:
        self._began: list[Callable[[Ticket, bytes | None], None]] = []
        self._started: list[Callable[[Ticket], None]] = []
        self._ended: list[Callable[[Ticket, str], None]] = []
        for observer in observers:
            self.add(observer)

    def add(self, observer: Observer) -> None:
        """One more, from the next event on."""
        kind = type(observer)
        if kind.began is not Observer.began:
            self._began.append(observer.began)
        if kind.started is not Observer.started:
            self._started.append(observer.started)
        if kind.ended is not Observer.ended:
            self._ended.append(observer.ended)

    def began(self, ticket: Ticket, traceparent: bytes | None) -> None:
        for began in self._began:
            began(ticket, traceparent)

    def started(self, ticket: Ticket) -> None:
        for started in self._started:
            started(ticket)

    def ended(self, ticket: Ticket, outcome: str) -> None:
        for ended in self._ended:
            ended(ticket, outcome)
