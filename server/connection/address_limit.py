"""A rate limit by client address, for gateways on public networks."""

from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from server.connection.protocol import ClientExchange, GatewayProtocol, Head
from server.request.errors import RateLimited, ServiceError

MOST_ADDRESSES = 65_536  # remembered; then the one that has not asked for longest is forgotten


class AddressLimit:
    """A token bucket for each address: `per_minute` requests at once, and as many each minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._most = float(per_minute)
        self._per_s = per_minute / 60.0
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (requests, when)

    def wait_s(self, address: str) -> float:
        """Counts a request. 0 if it may pass, else seconds until one may."""
        key, now = _key(address), self._clock()
        left, at = self._left.pop(key, (self._most, now))
        left = min(self._most, left + (now - at) * self._per_s)
        passes = left >= 1.0
        self._left[key] = (left - 1.0 if passes else left, now)
        if len(self._left) > MOST_ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if passes else (1.0 - left) / self._per_s


def _key(address: str) -> str:
    """Of an IPv6 address the network of 64 bits, which one subscriber has for himself."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    return str(int(found) >> 64) if isinstance(found, IPv6Address) else address


class LimitedProtocol(GatewayProtocol):
    """One client connection of a gateway that bounds requests by address. Those with a wrong key count, too."""

    addresses: AddressLimit

    def _objection(self, exchange: ClientExchange) -> ServiceError | None:
        """Counted when the head is complete, so that too much is refused before its body is taken in."""
        error = super()._objection(exchange)  # it takes the keys out of the headers, too
        wait_s = self.addresses.wait_s(exchange.client)
        return RateLimited("Too many requests from this address.", retry_after_s=wait_s) if wait_s else error

    def _start_known(self, head: Head, body: bytes) -> bool:
        """Left to the parser, so that each request is counted at one place."""
        return False
