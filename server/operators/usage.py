"""/admin/usage: what tenants, models and tiers used and cost, from hourly rows of the store."""

from collections.abc import Callable
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from server.cluster.usage import GROUPS, UsageBook, as_csv, hours
from server.operators.admin import StoreUnreachable
from server.request.errors import BadRequest, ServiceError
from server.store.store import StoreAway


class NotMetered(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "not_metered"


def usage_routes(book: UsageBook | None, authorize: Callable[[Request], None]) -> APIRouter:
    """book: None where nothing is metered."""
    router = APIRouter(prefix="/admin/usage", tags=["admin"], dependencies=[Depends(authorize)])

    @router.get("", summary="Usage and cost by hour, day, tenant, model or tier; format=csv for a table")
    async def usage(
        begin: Annotated[str, Query(alias="from")] = "",
        end: Annotated[str, Query(alias="to")] = "",
        by: str = "tenant",
        form: Annotated[str, Query(alias="format")] = "json",
    ) -> Response:
        if book is None:
            raise NotMetered("Usage is not metered: set `cost: {meter: true}`, or EVENHAND_COST__METER=true.")
        groups = tuple(dict.fromkeys(part.strip() for part in by.split(",") if part.strip()))
        if not set(groups) <= set(GROUPS):
            raise BadRequest(f"'by' is one or several of {', '.join(GROUPS)}, separated by commas.", param="by")
        if form not in ("json", "csv"):
            raise BadRequest("'format' is json or csv.", param="format")
        try:
            first, last = hours(begin, end, book.wall())
            rows, total = await book.used(first, last, groups)
        except ValueError as error:
            raise BadRequest(f"{error}.", param="from") from None
        except StoreAway as error:
            raise StoreUnreachable(f"{error}.", retry_after_s=5.0) from None
        if form == "csv":
            return Response(as_csv(rows, groups), media_type="text/csv; charset=utf-8")
        told = {"currency": book.meter.prices.currency, "by": groups, "rows": rows, "total": total}
        return Response(orjson.dumps(told), media_type="application/json")

    return router
