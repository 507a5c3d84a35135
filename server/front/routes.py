"""What is not relayed: models, health, readiness, metrics, and the OpenAPI page (of the relayed routes too)."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server.admission.live_names import LiveNames
from server.fleet.fleet import Fleet, described
from server.request.directory import Tenants
from server.request.errors import BadRequest, NotFound, ServiceError, UnknownModel, WrongMethod, error_object, status_of
from server.request.schemas import MESSAGES, ROUTES
from server.request.tenants import Tenant

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
OPERATORS_ONLY = ("/admin", "/console")
Metrics = Callable[[], Awaitable[bytes]]


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _error(error: ServiceError, path: str, *, anthropic: bool = False) -> Response:
    """In the shape of the API that a request is made for, by its path or its headers."""
    headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
    anthropic = anthropic or path == MESSAGES.path or path.startswith(f"{MESSAGES.path}/")
    return Response(error_object(error, anthropic=anthropic), status_of(error), headers, "application/json")


def public_app(
    fleet: Fleet,
    names: LiveNames,
    metrics: Metrics,
    tenants: Tenants,
    notes: Callable[[], dict[str, Any]],
    lifespan: Lifespan,
) -> FastAPI:
    """The ASGI application for all routes that are not relayed. notes: what /ready says besides the workers."""
    app = FastAPI(title="Evenhand", summary="OpenAI-compatible serving, fairly shared.", lifespan=lifespan)
    app.include_router(operations(fleet, metrics, notes))
    app.include_router(models(names, tenants))
    app.include_router(stored_responses(tenants))

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        return _error(error, request.url.path, anthropic=_is_anthropic(request))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        said = BadRequest(f"Invalid '{param}': {first['msg']}.", param=param or None)
        return _error(said, request.url.path, anthropic=_is_anthropic(request))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        wrong_method = error.status_code == 405 or request.url.path.encode() in ROUTES
        kind = WrongMethod if wrong_method else NotFound
        said = kind(f"There is no {request.method} {request.url.path} here.")
        answer = _error(said, request.url.path, anthropic=_is_anthropic(request))
        if wrong_method:
            answer.headers["allow"] = (error.headers or {}).get("Allow", "POST")
        return answer

    describe_relayed(app)
    return app


class AdminPortFilter:
    """The application as each address shows it: operators' routes do not exist on the public address.

    port: the operators' own; 0 as long as they have none, and everything is everywhere.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self.port and scope["server"][1] != self.port:
            if scope["path"].startswith(OPERATORS_ONLY):
                hidden = NotFound(
                    f"There is no {scope['method']} {scope['path']} here: it is on the gateway's admin port."
                )
                await _error(hidden, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)


class NotKept(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "response_not_found"


def stored_responses(tenants: Tenants) -> APIRouter:
    """What OpenAI has for responses that it keeps. Here none is kept: vLLM holds them in the memory of one engine, for
    ever, and does so only if it is told to."""
    router = APIRouter(prefix="/v1/responses/{response_id}", tags=["responses"])

    async def refuse(response_id: str, request: Request) -> Response:
        identified(tenants, request)
        raise NotKept(
            f"There is no response {response_id[:100]!r}: responses are not kept here. Read them where they are asked "
            "for, and send what was said before in 'input'.",
            param="response_id",
        )

    for method, path, what in (
        ("GET", "", "Retrieve a stored response: always 404, since none is stored"),
        ("DELETE", "", "Delete a stored response: always 404"),
        ("GET", "/input_items", "List the input of a stored response: always 404"),
        ("POST", "/cancel", "Cancel a background response: always 404, since there are none"),
    ):
        router.add_api_route(path, refuse, methods=[method], summary=what, name=f"{method} {path or 'response'}")
    return router


def operations(fleet: Fleet, metrics: Metrics, notes: Callable[[], dict[str, Any]]) -> APIRouter:
    """What operators and load balancers ask."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", summary="The process is alive")
    async def health() -> Response:
        return _json({"status": "ok"})

    @router.get("/ready", summary="At least one worker takes requests")
    async def ready() -> Response:
        workers = described(fleet.members.values())
        said = notes()
        if fleet.serves() and "stopping" not in said:
            missing = {"missing_roles": roles} if (roles := fleet.missing_roles()) else {}
            return _json({"status": "ready", "workers": workers, **missing, **said})
        waiting = {"status": "not ready", "workers": workers, "starting": fleet.starting, **said}
        return _json(waiting, 503, {"retry-after": "5"})

    @router.get("/metrics", summary="Prometheus metrics")
    async def counted() -> Response:
        return Response(await metrics(), media_type=CONTENT_TYPE_LATEST)

    return router


def identified(tenants: Tenants, request: Request) -> Tenant:
    """The tenant of a request's key, the first of each header counting. UnknownKey if there is none."""
    sent = {name: value for name, value in reversed(request.headers.raw)}
    return tenants.identify(sent.get(b"authorization"), sent.get(b"x-api-key"))


def models(names: LiveNames, tenants: Tenants) -> APIRouter:
    """OpenAI's list of models: those that the tenant may use."""
    router = APIRouter(tags=["models"])

    def allowed(request: Request) -> list[dict[str, object]]:
        return names.listed(identified(tenants, request))

    @router.get("/v1/models", summary="The models that are served")
    @router.get("/v1/models/", include_in_schema=False)
    async def listed(request: Request) -> Response:
        entries = allowed(request)
        if not _is_anthropic(request):
            return _json({"object": "list", "data": entries})
        data = [_anthropic_model(entry) for entry in entries]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return _json({"data": data, "has_more": False, "first_id": first, "last_id": last})

    @router.get("/v1/models/{model:path}", summary="One model")
    async def one(model: str, request: Request) -> Response:
        for entry in allowed(request):
            if entry.get("id") == model:
                return _json(_anthropic_model(entry) if _is_anthropic(request) else entry)
        raise UnknownModel(f"The model '{model[:100]}' is not served here.", param="model")

    return router


def _is_anthropic(request: Request) -> bool:
    """Whether a request is made for Anthropic's API, all of whose clients send this header."""
    return "anthropic-version" in request.headers


def _anthropic_model(entry: dict[str, object]) -> dict[str, object]:
    """A model as Anthropic's API lists it."""
    created, name = entry.get("created"), str(entry.get("id"))
    seconds = created if isinstance(created, int | float) else 0
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": entry.get("max_model_len"),
    }


def describe_relayed(app: FastAPI) -> None:
    """Adds the relayed routes to the OpenAPI document; they are answered before ASGI. A request that FastAPI would
    answer with 422 has status 400 here."""
    native = app.openapi

    def openapi() -> dict[str, Any]:
        document = native()
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            if operation["responses"].pop("422", None) is not None:
                operation["responses"]["400"] = {"description": "The request is invalid"}
        for route in ROUTES.values():
            document["paths"].setdefault(route.path, {"post": _operation(route.content_field)})
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _operation(content_field: str) -> dict[str, Any]:
    body = {
        "type": "object",
        "required": ["model"],
        "properties": {
            "model": {"type": "string"},
            "stream": {"type": "boolean", "nullable": True},
            content_field: {},
        },
        "additionalProperties": True,
    }
    answers = {
        "200": "The engine's answer, or its stream of events",
        "400": "The request is invalid",
        "401": "The API key is unknown",
        "404": "The model is not served",
        "413": "The body is too large",
        "429": "A limit is reached, or the queue is full: see Retry-After",
        "502": "The engine failed",
        "503": "No worker is ready: see Retry-After",
    }
    return {
        "summary": "Relayed to a worker; docs/api.md lists the fields that pass through",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {status: {"description": text} for status, text in answers.items()},
    }
