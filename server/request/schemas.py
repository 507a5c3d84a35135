"""From a request body to a `Call`: only the fields that we act on are parsed; all others pass through as they came."""

import msgspec

from server.request.call import Call, Route
from server.request.errors import BadRequest
from server.request.tenants import Tenant

CHAT = Route(
    "/v1/chat/completions",
    usage_on_request=True,
    xargs=True,
    handover=True,
    limit_fields=("max_completion_tokens", "max_tokens"),
    role_first=True,
    resumes=True,
)
COMPLETIONS = Route(
    "/v1/completions",
    usage_on_request=True,
    xargs=True,
    handover=True,
    content_field="prompt",
    prompts=True,
    resumes=True,
)
RESPONSES = Route(
    "/v1/responses",
    xargs=True,
    limit_fields=("max_output_tokens",),
    content_field="input",
    token_mark=b".delta\n",
)
MESSAGES = Route("/v1/messages", xargs=True, anthropic=True, token_mark=b"block_delta\n")
EMBEDDINGS = Route("/v1/embeddings", content_field="input", prompts=True)
TOKENIZE = Route("/tokenize", generates=False, content_field="prompt")
ROUTES: dict[bytes, Route] = {
    route.path.encode(): route for route in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS, TOKENIZE)
}

# Fields with which a client would steer the engine or its scheduler: refused unless the tenant is granted them.
STEERING = ("vllm_xargs", "priority", "kv_transfer_params", "cache_salt", "request_id", "data_parallel_rank")

MAX_SEQUENCES = 128  # OpenAI's own bound on `n`
MAX_OUTPUT_TOKENS = 2**31
LONGEST_DEADLINE_S = 1e9


ABSENT = msgspec.Raw(b"")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Fields(msgspec.Struct):
    """What we read of a body. `Raw` fields are not parsed, only measured or noticed."""

    model: str
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    stream_options: StreamOptions | None = None
    tools: msgspec.Raw = ABSENT
    response_format: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    vllm_xargs: msgspec.Raw = ABSENT
    priority: msgspec.Raw = ABSENT
    kv_transfer_params: msgspec.Raw = ABSENT
    cache_salt: msgspec.Raw = ABSENT
    request_id: msgspec.Raw = ABSENT
    data_parallel_rank: msgspec.Raw = ABSENT


# A member that comes twice counts as its last: here and in engines.
_decode = msgspec.json.Decoder(Fields).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def deadline_from(header: bytes) -> float:
    """Seconds within which an answer must begin, as a client's `x-deadline-s` says. BadRequest unless above 0."""
    try:
        deadline_s = float(header)
    except ValueError:
        deadline_s = 0.0
    if not 0.0 < deadline_s < LONGEST_DEADLINE_S:
        raise BadRequest(
            "'x-deadline-s' is how many seconds your answer may take to begin, above 0.", param="x-deadline-s"
        )
    return deadline_s


def call_from(route: Route, body: bytes, tenant: Tenant, call_id: str, bytes_per_token: float) -> Call:
    """Reads a body. Raises BadRequest with a sentence that names the field."""
    fields = _parsed(body)
    if not fields.model:
        raise BadRequest("The field 'model' is empty: name one of the models that /v1/models lists.", param="model")
    _refuse_steering(fields, tenant)
    stream = bool(fields.stream)
    asked = fields.stream_options is not None and bool(fields.stream_options.include_usage)
    hide_usage = route.usage_on_request and stream and not asked
    content = bytes(getattr(fields, route.content_field))
    return Call(
        id=call_id,
        route=route,
        tenant=tenant,
        model=fields.model,
        stream=stream,
        body=with_usage(body) if hide_usage else body,
        hide_usage=hide_usage,
        prompt_tokens=estimate_tokens(content, bytes_per_token),
        max_tokens=_output_limit(route, fields),
        sequences=(1 if fields.n is None else _within(fields.n, 1, MAX_SEQUENCES, "n"))
        * (_prompts(content) if route.prompts else 1),
        kind=_kind(fields),
        steers_kv=fields.kv_transfer_params is not ABSENT and bytes(fields.kv_transfer_params) != b"null",
    )


def _output_limit(route: Route, fields: Fields) -> int:
    for name in route.limit_fields:
        value: int | None = getattr(fields, name)
        if value is not None:
            return _within(value, 0, MAX_OUTPUT_TOKENS, name)
    return 0


def _parsed(body: bytes) -> Fields:
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        said = str(error)
        where = said.rpartition("`$.")[2].rstrip("`") if "`$." in said else None
        raise BadRequest(f"The request body does not fit: {said}.", param=where) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.", code="invalid_json") from None


def _refuse_steering(fields: Fields, tenant: Tenant) -> None:
    if (
        fields.vllm_xargs is ABSENT is fields.priority
        and fields.kv_transfer_params is ABSENT is fields.cache_salt
        and fields.request_id is ABSENT is fields.data_parallel_rank
    ):
        return  # nearly all: what follows costs as much as all else that is read here
    for name in STEERING:
        if bytes(getattr(fields, name)) not in (b"", b"null") and name not in tenant.grants:
            raise BadRequest(
                f"The field '{name}' steers the engine and is not open to clients: remove it, or ask the operator to "
                "grant it to your tenant.",
                param=name,
                code="field_not_allowed",
            )


def _within(value: int, least: int, most: int, name: str) -> int:
    if not least <= value <= most:
        raise BadRequest(f"'{name}' must lie between {least} and {most}, not {value}.", param=name)
    return value


def _kind(fields: Fields) -> str:
    if fields.tools is not ABSENT and bytes(fields.tools) not in (b"null", b"[]"):
        return "tools"
    return "json" if fields.response_format is not ABSENT and b"json" in bytes(fields.response_format) else ""


def with_usage(body: bytes) -> bytes:
    """The body with `stream_options.include_usage` asked for, so that the answer ends with the exact count. Every other
    member keeps its bytes."""
    if b'"stream_options"' not in body:
        return splice(body, b'"stream_options":{"include_usage":true}')
    members = raw_members(body)
    options = members.get("stream_options")
    told = raw_members(options) if options is not None and bytes(options)[:1] == b"{" else {}
    told["include_usage"] = msgspec.Raw(b"true")
    members["stream_options"] = msgspec.Raw(msgspec.json.encode(told))
    return msgspec.json.encode(members)


def raw_members(body: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """A JSON object's members by name, each value as its own bytes. BadRequest for a name that is not UTF-8."""
    try:
        return _members(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None


def splice(body: bytes, members: bytes) -> bytes:
    """A JSON object with more members behind its own, where they count even if it has such members already."""
    return body[: body.rindex(b"}")] + b"," + members + b"}"


def _prompts(content: bytes) -> int:
    """How many prompts a prompt field holds: several only if it is a list of texts or of lists of token ids."""
    if content[:1] != b"[" or content[1:64].lstrip()[:1] not in (b'"', b"["):
        return 1
    return len(_list(content))


def estimate_tokens(content: bytes, bytes_per_token: float) -> int:
    """Prompt tokens before any tokenizer saw them: exact for token ids, else from the length in bytes."""
    if content[:1] == b"[" and content[1:64].lstrip(b"[ \t\r\n")[:1].isdigit():
        return content.count(b",") + 1
    size = len(content)
    if b";base64," in content:  # an image's bytes are not its tokens: a few hundred each is what vision models make
        size = sum(min(len(part), 4096) if part.startswith(b"data:") else len(part) for part in content.split(b'"'))
    return max(1, round(size / bytes_per_token))
