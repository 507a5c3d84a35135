"""Service tiers of requests: which tier a tenant may use, and the cost of its tokens.

OpenAI's `service_tier` is `auto`, `default`, `flex` or `priority`. On /v1/messages Anthropic's own values mean: `auto`
is `priority` where that is granted, and `standard_only` is `default`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from scheduler.jobs import Tier
from scheduler.tiers import BY_NAME
from server.request.call import Route
from server.request.errors import BadRequest, NotAllowed
from server.request.tenants import Tenant

_ANTHROPIC_NAMES: Final[Mapping[Tier, str]] = {Tier.DEFAULT: "standard"}


@dataclass(frozen=True, slots=True)
class TierCosts:
    """What a token counts for in limits and budgets, by tier; in the default tier it counts as one."""

    flex: float = 0.5
    priority: float = 2.0

    def of(self, tokens: int, tier: Tier) -> int:
        """What so many tokens count for."""
        if tier is Tier.DEFAULT:
            return tokens
        return round(tokens * (self.flex if tier is Tier.FLEX else self.priority))


def tier_for(told: str, route: Route, tenant: Tenant) -> Tier:
    """The tier that `service_tier` asks for. BadRequest if there is none such, NotAllowed if it is not granted."""
    if told == "auto":
        return Tier.PRIORITY if route.anthropic and Tier.PRIORITY in tenant.tiers else tenant.usual_tier
    tier = Tier.DEFAULT if route.anthropic and told == "standard_only" else BY_NAME.get(told)
    if tier is None:
        raise BadRequest(
            f"'service_tier' is auto, default, flex or priority, not '{told[:30]}'.",
            param="service_tier",
            code="invalid_value",
        )
    if tier not in tenant.tiers:
        raise NotAllowed(
            f"Your tenant may not use the service tier '{tier.label}': leave 'service_tier' out, or ask the operator "
            "to grant it.",
            param="service_tier",
            code="service_tier_not_granted",
        )
    return tier


def told_name(tier: Tier, route: Route) -> str:
    """The tier as an answer names it."""
    return _ANTHROPIC_NAMES.get(tier, tier.label) if route.anthropic else tier.label
