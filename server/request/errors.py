"""The errors of a request, and their form in each API dialect."""

from math import ceil
from typing import TYPE_CHECKING, ClassVar

import orjson

if TYPE_CHECKING:
    from server.request.call import Dialect


class ServiceError(Exception):
    """A request ends with an error that its client is told about.

    status: HTTP status when nothing has been answered yet.
    kind, code: OpenAI's `type` and `code`.
    retry_after_s: goes out as Retry-After when it is worth trying again.
    number: of its event, in a stream whose events are numbered; None if it is not known.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: str | None = None
    number: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    @property
    def retry_after(self) -> int | None:
        """Retry-After has whole seconds: never too early, and not one more for a rounding error."""
        return None if self.retry_after_s is None else max(1, ceil(self.retry_after_s - 1e-6))


class BadRequest(ServiceError):
    status = 400
    kind = "invalid_request_error"


class NotAllowed(ServiceError):
    status = 403
    kind = "permission_error"
    code = "forbidden"


class UnknownKey(ServiceError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class UnknownModel(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class NotFound(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "unknown_url"


class WrongMethod(ServiceError):
    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


class TooSlow(ServiceError):
    status = 408
    kind = "invalid_request_error"
    code = "request_timeout"


class TooLarge(ServiceError):
    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ServiceError):
    status = 415
    kind = "invalid_request_error"
    code = "unsupported_media_type"


class HeadTooLarge(ServiceError):
    status = 431
    kind = "invalid_request_error"
    code = "headers_too_large"


class Overloaded(ServiceError):
    status = 429
    kind = "overloaded_error"
    code = "overloaded"


class RateLimited(ServiceError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineGone(ServiceError):
    status = 502
    kind = "server_error"
    code = "engine_gone"


class EngineUnreachable(EngineGone):
    """Not even a connection: nothing of the request has left."""


class EngineUntrusted(EngineUnreachable):
    """A certificate problem between gateway and worker; the message says what is wrong, without an address."""


class EngineRefusesKey(EngineGone):
    """The worker does not know the gateway's key; the message names no address."""


class EngineHungUp(EngineGone):
    """The engine closed the connection before its answer was complete: it may have died, or only this answer."""


class EngineLost(EngineGone):
    """The gateway's own look at the engine shows that nothing more will come from it."""


class NoWorker(ServiceError):
    status = 503
    kind = "server_error"
    code = "no_worker"


class TooManyConnections(ServiceError):
    status = 503
    kind = "server_error"
    code = "too_many_connections"


class OutOfFiles(ServiceError):
    """The gateway itself can open no more files. No worker is to blame."""

    status = 503
    kind = "server_error"
    code = "out_of_files"


class Stopping(ServiceError):
    status = 503
    kind = "server_error"
    code = "stopping"


class Refused(ServiceError):
    """The engine answered with an error of its own; its words and status are passed on."""

    def __init__(self, status: int, message: str, *, kind: str, param: str | None, code: str | None) -> None:
        super().__init__(message, param=param, code=code)
        self.refused_status = status
        self.refused_kind = kind


ENGINE_FAILURES = (500, 502, 503, 504)


def is_engine_failure(error: BaseException | None) -> bool:
    """Whether it is the worker that failed, so that another one may do better."""
    return isinstance(error, EngineGone) or (isinstance(error, Refused) and error.refused_status in ENGINE_FAILURES)


def may_be_the_request(error: ServiceError) -> bool:
    """Whether a request can have made an engine fail that is well. Not with 503, which says that the engine is busy."""
    return isinstance(error, EngineHungUp) or (isinstance(error, Refused) and error.refused_status != 503)


def is_same_refusal(one: ServiceError, other: ServiceError) -> bool:
    """Whether two engines failed on a request with the same status, so that the request is to blame."""
    return (
        isinstance(one, Refused)
        and isinstance(other, Refused)
        and one.refused_status == other.refused_status
        and may_be_the_request(other)
    )


def status_of(error: ServiceError) -> int:
    """The HTTP status of an error."""
    return error.refused_status if isinstance(error, Refused) else error.status


def outcome_of(error: BaseException) -> str:
    """What metrics call this end of a request: few words, none of them an engine's or a client's own."""
    if isinstance(error, Refused):
        return f"engine_{error.refused_status}"
    return (error.code or error.kind) if isinstance(error, ServiceError) else "internal_error"


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def _kind(error: ServiceError) -> str:
    return error.refused_kind if isinstance(error, Refused) else error.kind


def error_object(error: ServiceError, *, anthropic: bool = False) -> bytes:
    """The JSON body of an error, as OpenAI (or Anthropic) shapes it."""
    kind = _kind(error)
    if anthropic:
        status = status_of(error)
        kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
        if isinstance(error, Overloaded):
            kind = error.kind
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": error.message}})
    return orjson.dumps({"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}})


def error_event(error: ServiceError, dialect: "Dialect") -> bytes:
    """The last events of a stream that cannot go on: too late for a status."""
    if dialect == "messages":
        return b"event: error\ndata: " + error_object(error, anthropic=True) + b"\n\n"
    if dialect == "responses":
        event: dict[str, object] = {
            "type": "error",
            "code": error.code or _kind(error),
            "message": error.message,
            "param": error.param,
        }
        if error.number is not None:
            event["sequence_number"] = error.number
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + error_object(error) + b"\n\ndata: [DONE]\n\n"


# How engines say that a prompt is too long: vLLM twice, SGLang, llama.cpp.
_TOO_LONG = ("maximum context length", "maximum model length", "model's context length", "available context size")


def refusal(status: int, body: bytes) -> Refused:
    """An engine's own error answer, in our shape. Whatever it sent, the client gets an OpenAI error object."""
    if status < 400:  # neither an answer nor a refusal: a redirection, which is not for the client to follow
        return Refused(502, f"The engine answered with status {status}.", kind="server_error", param=None, code=None)
    message, kind, param, code = "", "invalid_request_error" if status < 500 else "server_error", None, None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        if isinstance(inner, dict):
            message = str(inner.get("message") or inner.get("detail") or "")
            param = inner.get("param") if isinstance(inner.get("param"), str) else None
            param = param.removeprefix("body.") if param else None  # pydantic's word for where the field is
            code = inner.get("code") if isinstance(inner.get("code"), str) else None
        elif isinstance(inner, str):
            message = inner
    if any(words in message for words in _TOO_LONG):
        code = "context_length_exceeded"
    if not message:
        message = f"The engine answered with status {status}."
    return Refused(status, message, kind=kind, param=param, code=code)


def answer_refused(status: int, body: bytes) -> ServiceError:
    """An engine's whole answer that is an error. What it says of the gateway's own key is not the client's business."""
    if status == UnknownKey.status:
        return EngineRefusesKey("The worker refuses the gateway's key.")
    return refusal(status, body)
