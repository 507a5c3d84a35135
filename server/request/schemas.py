"""Parses a request body into a `Call`: reads only the fields the gateway acts on; other allowed fields pass through."""

import re
from collections.abc import Callable
from operator import attrgetter
from typing import cast

import msgspec

from server.request.call import Call, Route
from server.request.errors import BadRequest
from server.request.fields import ALLOWED, PROMPT
from server.request.media import LARGEST_MEDIA_BYTES, media_bytes_beyond
from server.request.tenants import Tenant
from server.request.tiers import tier_for

CHAT = Route(
    "/v1/chat/completions",
    usage_on_request=True,
    xargs=True,
    handover=True,
    limit_fields=("max_completion_tokens", "max_tokens"),
    chat=True,
    choices=True,
    resumes=True,
    tells_ids=True,
)
COMPLETIONS = Route(
    "/v1/completions",
    usage_on_request=True,
    xargs=True,
    handover=True,
    content_field="prompt",
    prompts=True,
    choices=True,
    resumes=True,
    tells_ids=True,
)
RESPONSES = Route(
    "/v1/responses",
    xargs=True,
    limit_fields=("max_output_tokens",),
    content_field="input",
    dialect="responses",
    resumes=True,
)
MESSAGES = Route("/v1/messages", xargs=True, anthropic=True, dialect="messages", resumes=True)
EMBEDDINGS = Route("/v1/embeddings", makes_tokens=False, content_field="input", prompts=True)
TOKENIZE = Route("/tokenize", generates=False, makes_tokens=False, content_field="prompt")
DETOKENIZE = Route("/detokenize", generates=False, makes_tokens=False, content_field="tokens")
COUNT_TOKENS = Route(
    "/v1/messages/count_tokens", generates=False, makes_tokens=False, anthropic=True, dialect="messages"
)
ROUTES: dict[bytes, Route] = {
    route.path.encode(): route
    for route in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT_TOKENS, EMBEDDINGS, TOKENIZE, DETOKENIZE)
}

MAX_SEQUENCES = 128  # OpenAI's own bound on `n`
MAX_PROMPTS = 2048  # OpenAI's own bound on the inputs of one request for embeddings
MAX_OUTPUT_TOKENS = 2**31
LONGEST_OPTIONS_BYTES = 4096
LONGEST_DEADLINE_S = 1e9

_ABSENT = msgspec.Raw(b"null")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # JSON has none, but some clients send it (RFC 8259, 8.1, allows to ignore it)
_NEUTRAL = (b"null", b"false")  # a field that says nothing is refused to nobody
_NO_TOOLS = (b"null", b"[]")
_KNOWN = frozenset().union(*ALLOWED.values())


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Fields(msgspec.Struct):
    """The members that we act on, the prompt apart."""

    model: str
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    include_reasoning: bool | None = None
    service_tier: str | None = None
    tools: msgspec.Raw = _ABSENT
    response_format: msgspec.Raw = _ABSENT


Members = dict[str, msgspec.Raw]
_NOTHING: Members = {}


def _reader(path: str) -> Callable[[bytes], Fields]:
    """Reads a body that has no field but those that are listed for a route: those of `Fields` as values, the others as
    they are written. ValidationError for any other field."""
    listed, ours = ALLOWED[path], {field.name: field for field in msgspec.structs.fields(Fields)}
    as_written = [(name, msgspec.Raw, _ABSENT) for name in sorted(listed - ours.keys())]
    as_values = [
        (name, field.type) if field.required else (name, field.type, field.default)
        for name, field in ours.items()
        if name in listed
    ]
    absent = {name: field.default for name, field in ours.items() if name not in listed}
    kind = msgspec.defstruct("Listed", [*as_values, *as_written], namespace=absent, forbid_unknown_fields=True)
    return cast(Callable[[bytes], Fields], msgspec.json.Decoder(kind).decode)


# Every member or prompt becomes an object, and a body of 32 MiB can have millions: they would block the event loop for
# seconds. Where there may be too many, by this count of separators, they are counted by a decoder that stops in time.
_SAFE_MEMBERS = 20_000

# A member that comes twice counts as its last: here and in engines.
_read_members = msgspec.json.Decoder(Members).decode
_read_listed = {path: _reader(path) for path in ALLOWED}
_read_fields = msgspec.json.Decoder(Fields).decode
# Of one name alone `attrgetter` would give no tuple, so two that every body has stand before them.
_prompt_fields = {path: attrgetter("model", "stream", *sorted(listed & PROMPT)) for path, listed in ALLOWED.items()}
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNLISTED = "Object contains unknown field"  # what msgspec says of it
_encode = msgspec.json.Encoder().encode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_read_prompts = msgspec.json.Decoder(
    msgspec.defstruct(
        "Prompts",
        [(f"prompt_{number}", msgspec.Raw, _ABSENT) for number in range(MAX_PROMPTS)],
        array_like=True,
        forbid_unknown_fields=True,
    )
).decode
_SEVERAL = re.compile(rb'\[\s*["\[]')
_MAYBE_IDS = re.compile(rb"\[\s*[\d\[]")
_NO_TOKEN_IDS = b"0123456789,[] \t\r\n"


def deadline_from(header: bytes) -> float:
    """Seconds within which an answer must begin, as a client's `x-deadline-s` says. BadRequest unless above 0."""
    try:
        deadline_s = float(header)
    except ValueError:
        deadline_s = 0.0
    if not 0.0 < deadline_s < LONGEST_DEADLINE_S:
        raise BadRequest(
            "'x-deadline-s' must be the seconds within which the answer must start, above 0.", param="x-deadline-s"
        )
    return deadline_s


def call_from(route: Route, body: bytes, tenant: Tenant, call_id: str, bytes_per_token: float) -> Call:
    """Reads a body. Raises BadRequest with a sentence that names the field."""
    body = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        fields, unlisted = _read_listed[route.path](body), _NOTHING
    except _UNREADABLE:
        fields, unlisted = _with_unlisted(route, body, tenant)
    if not fields.model:
        raise BadRequest("The field 'model' is empty: name one of the models that /v1/models lists.", param="model")
    if route.dialect == "responses" and b"null" in body:
        body = _without_nulls(body)
    stream, options = bool(fields.stream), fields.stream_options
    hide_usage = route.usage_on_request and stream and not (options is not None and options.include_usage)
    prompts = _prompts(bytes(getattr(fields, route.content_field)), route.content_field) if route.prompts else 1
    return Call(
        id=call_id,
        route=route,
        tenant=tenant,
        model=fields.model,
        stream=stream,
        body=with_usage(body, options) if hide_usage else body,
        hide_usage=hide_usage,
        prompt_tokens=prompt_estimate(route, fields, unlisted, bytes_per_token),
        max_tokens=_output_limit(route, fields),
        sequences=prompts if fields.n is None is fields.best_of else prompts * _choices(route, fields),
        kind="" if fields.tools is fields.response_format is _ABSENT else _kind(fields),
        steers_kv=bytes(unlisted.get("kv_transfer_params", _ABSENT)) != b"null",
        prompts=prompts,
        wants_ids=bool(fields.return_token_ids),
        hides_tokens=fields.include_reasoning is False,
        tier=tenant.usual_tier if fields.service_tier is None else tier_for(fields.service_tier, route, tenant),
        tells_tier=fields.service_tier is not None,
    )


def _with_unlisted(route: Route, body: bytes, tenant: Tenant) -> tuple[Fields, Members]:
    """A body's listed fields, and those beyond that its tenant may send. BadRequest that says what is wrong."""
    listed = ALLOWED[route.path]
    try:
        if body.count(b":") > _SAFE_MEMBERS and not tenant.grants:
            _read_listed[route.path](body)
        members = _read_members(body)
        _read_fields(_encode({name: raw for name, raw in members.items() if name in Fields.__struct_fields__}))
        for name in members.keys() - listed - tenant.grants:
            _refuse_unlisted(route, name, members[name])
        fields = _read_listed[route.path](_encode({name: raw for name, raw in members.items() if name in listed}))
    except _UNREADABLE as error:
        raise _misfit(error) from None
    unlisted = {name: raw for name, raw in members.items() if name not in listed}
    if bytes(unlisted.get("vllm_xargs", _ABSENT))[:1] not in (b"{", b"n"):  # an object, or null
        raise BadRequest("The field 'vllm_xargs' must be an object.", param="vllm_xargs")
    return fields, unlisted


def _misfit(error: BaseException) -> BadRequest:
    """The error message for a body that cannot be parsed."""
    if isinstance(error, RecursionError):
        return BadRequest("The request body is nested too deeply.", code="invalid_json")
    said = str(error)[:300]
    if not isinstance(error, msgspec.ValidationError):
        return BadRequest(f"The request body is not valid JSON: {said}.", code="invalid_json")
    if said.startswith(_UNLISTED):
        return BadRequest(
            f"The request body is invalid: {said}. A body of this size may contain only the listed fields.",
            code="field_not_allowed",
        )
    where = said.rpartition("`$.")[2].rstrip("`") if "`$." in said else None
    return BadRequest(f"The request body is invalid: {said}.", param=where)


def _refuse_unlisted(route: Route, name: str, value: msgspec.Raw) -> None:
    if bytes(value) not in _NEUTRAL:
        raise BadRequest(
            f"The field {name[:64]!r} is not allowed on {route.path}: remove it, or ask the operator to "
            "grant it to your tenant. docs/api.md lists the allowed fields.",
            param=name[:64],
            code="field_not_allowed",
        )


def _without_nulls(body: bytes) -> bytes:
    """The body without members that are null, which mean the same as none to OpenAI, and are an error to vLLM."""
    members = raw_members(body)
    told = {name: raw for name, raw in members.items() if bytes(raw) != b"null"}
    return _encode(told) if len(told) < len(members) else body


def _choices(route: Route, fields: Fields) -> int:
    """How many answers an engine makes to each prompt, 1 where it does not read `n`."""
    n = 1 if fields.n is None else _within(fields.n, 1, MAX_SEQUENCES, "n")
    best_of = 1 if fields.best_of is None else _within(fields.best_of, 1, MAX_SEQUENCES, "best_of")
    return max(n, best_of) if route.choices else 1


def _output_limit(route: Route, fields: Fields) -> int:
    for name in route.limit_fields:
        value: int | None = getattr(fields, name)
        if value is not None:
            return value if 0 <= value <= MAX_OUTPUT_TOKENS else _within(value, 0, MAX_OUTPUT_TOKENS, name)
    return 0


def _within(value: int, least: int, most: int, name: str) -> int:
    if not least <= value <= most:
        raise BadRequest(f"'{name}' must be between {least} and {most}, not {value}.", param=name)
    return value


def _kind(fields: Fields) -> str:
    if bytes(fields.tools) not in _NO_TOOLS:
        return "tools"
    return "json" if b"json" in bytes(fields.response_format) else ""


def with_usage(body: bytes, options: StreamOptions | None) -> bytes:
    """The body with `stream_options.include_usage` asked for, so that the answer ends with the exact count, and with no
    usage in every chunk, which the client would not get without it. Every other member keeps its bytes."""
    if options is None and b"stream_options" not in body:  # else it is null, or the name is somewhere in a text
        return body[: body.rindex(b"}")] + b',"stream_options":{"include_usage":true}}'
    members = raw_members(body)
    asked = bytes(members.get("stream_options", _ABSENT))
    if len(asked) > LONGEST_OPTIONS_BYTES:
        raise BadRequest("'stream_options' is too long.", param="stream_options")
    told = {} if options is None else raw_members(asked)
    told.pop("continuous_usage_stats", None)
    told["include_usage"] = msgspec.Raw(b"true")
    return _encode(members | {"stream_options": msgspec.Raw(_encode(told))})


def raw_members(body: bytes | msgspec.Raw) -> Members:
    """A JSON object's members by name, each value as its own bytes. BadRequest for a name that is not UTF-8."""
    try:
        return _read_members(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None


def splice(body: bytes, members: bytes) -> bytes:
    """A JSON object with more members behind its own, where they count even if it has such members already."""
    return body[: body.rindex(b"}")] + b"," + members + b"}"


def _prompts(content: bytes, name: str) -> int:
    """How many prompts a prompt field holds: several only if it is a list of texts or of lists of token ids."""
    if not _SEVERAL.match(content):
        return 1
    if content.count(b",") < MAX_PROMPTS:
        return len(_list(content))
    try:
        read = _read_prompts(content)
    except msgspec.ValidationError:
        raise BadRequest(
            f"'{name}' has more than {MAX_PROMPTS} prompts: split the request.", param=name, code="too_many_sequences"
        ) from None
    return sum(1 for prompt in msgspec.structs.astuple(read) if prompt is not _ABSENT)


def prompt_estimate(route: Route, fields: Fields, unlisted: Members, bytes_per_token: float) -> int:
    """Prompt tokens before any tokenizer saw them: of every field whose text becomes part of the prompt, and of every
    field that is not on the list of those that are open to all."""
    total = 0
    for raw in _prompt_fields[route.path](fields)[2:]:
        if raw is not _ABSENT:
            total += estimate_tokens(bytes(raw), bytes_per_token)
    for name, raw in unlisted.items():
        if name in PROMPT:
            total += estimate_tokens(bytes(raw), bytes_per_token)
        elif name not in _KNOWN:
            total += round(len(bytes(raw)) / bytes_per_token)
    return max(1, total)


def estimate_tokens(content: bytes, bytes_per_token: float) -> int:
    """Tokens of one field: exact for token ids, else from the length in bytes."""
    if _MAYBE_IDS.match(content) and not content.translate(None, _NO_TOKEN_IDS):
        return content.count(b",") + 1
    size = len(content)
    if size > LARGEST_MEDIA_BYTES:
        size -= media_bytes_beyond(content, LARGEST_MEDIA_BYTES)
    return max(1, round(size / bytes_per_token))
