"""Who is at the other end: the peer's address, or what a proxy that is trusted says of it."""

import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

_FOR = re.compile(r"""(?:^|[;,\s])for=(?:"([^"]*)"|([^;,\s"]*))""", re.IGNORECASE)
_MOST_HOPS = 32


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Addresses and networks as CIDR. ValueError with the one that is none."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ip_network(text, strict=False))
        except ValueError:
            raise ValueError(f"{text!r} is neither an address nor a network such as 10.0.0.0/8") from None
    return tuple(found)


def client_of(peer: str, headers: Mapping[bytes, bytes], trusted: Sequence[Network]) -> str:
    """The client's address: of those that the proxies tell, the last that no trusted proxy has.

    What a client itself writes into the header comes before what the first trusted proxy adds, and counts for nothing.
    Of `Forwarded` (RFC 7239) and `X-Forwarded-For` a request has one: where it has both, either may be the client's
    own, and neither counts.
    """
    address = peer
    if not _is_trusted(address, trusted):
        return address
    for told in reversed(_told(headers)):
        plain = _plain(told)
        if plain is None:  # "unknown", or a pseudonym: who is behind it is not known
            return address
        address = plain
        if not _is_trusted(address, trusted):
            return address
    return address


def _told(headers: Mapping[bytes, bytes]) -> list[str]:
    forwarded = headers.get(b"forwarded")
    if forwarded is not None and b"x-forwarded-for" in headers:
        return []
    if forwarded is not None:
        found = [quoted or token for quoted, token in _FOR.findall(forwarded.decode("latin-1"))]
    else:
        found = headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    return found[-_MOST_HOPS:] if found != [""] else []


def _plain(told: str) -> str | None:
    """An address without port and brackets, None for what is none."""
    text = told.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(_mapped(ip_address(text)))
    except ValueError:
        return None


def _is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    try:
        found = _mapped(ip_address(address))
    except ValueError:
        return False
    return any(found in network for network in trusted)


def _mapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """An IPv4 address that came over an IPv6 socket."""
    return getattr(address, "ipv4_mapped", None) or address
