"""Who is charged and limited: a tenant, found by its API key."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks.

    name: shown in metrics and used as the scheduler's tenant.
    weight: its share of the engines against others' (1 is the default).
    grants: request fields that steer the engine and that this tenant may use all the same.
    """

    name: str
    weight: float = 1.0
    grants: frozenset[str] = frozenset()


OPEN = Tenant(name="open")


class Tenants:
    """API key → tenant. Without any key configured there is one open tenant."""

    def identify(self, authorization: bytes | None, api_key: bytes | None) -> Tenant:
        """The tenant of a request's credentials. Raises UnknownKey."""
        return OPEN
