"""Continuing a stream of /v1/responses or /v1/messages at another worker.

Their events carry no token ids, so the text that the client has is what both workers know. The other worker tokenizes
the prompt and that text, and completes the two; its completion becomes the rest of the first worker's stream. This is
exact wherever a text has the token ids that were sampled for it, which is the rule for trained models; where not, it is
an answer that the model may give after the same text.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from server.engine.answers import Said, Usage, as_published, data_of, read_event
from server.failover.resume import GO_ALONG, SPENT, CannotResume, Rest, check_fields, ends_within, kept_of, stop_texts
from server.failover.typed_answers import AnswerEnd, Json, TypedAnswer, typed_answer
from server.failover.typed_prompt import chat_of
from server.fleet.fleet import Member
from server.observe.telemetry import Distribution
from server.relay.relay import ClientAnswer
from server.request.call import Call, Dialect, Ticket
from server.request.errors import EngineGone
from server.request.schemas import COMPLETIONS, raw_members

# What only these two APIs have, and what has done its work once the prompt is rendered.
_SPENT = SPENT | frozenset(
    "input instructions system max_output_tokens max_tool_calls truncation stop_sequences cache_control".split()
)
_NEUTRAL: dict[str, tuple[Json, ...]] = {
    "text": ({"format": {"type": "text"}},),
    "thinking": ({"type": "disabled"},),
}


@dataclass(frozen=True, slots=True)
class TypedContinuation:
    """What another worker is asked. prompt_tokens, made: tokens of the prompt, and of the text that the client has.

    body: empty if no token is left to be made, so that the stream only has to be closed.
    """

    body: bytes
    prompt_tokens: int
    made: int


def answer_so_far(ticket: Ticket) -> TypedAnswer:
    """What the client of a stream has. CannotResume."""
    try:
        return typed_answer(ticket.call.route.dialect, kept_of(ticket))
    except ValueError as error:
        raise CannotResume(str(error)) from None


def fit_to_continue(call: Call, answer: TypedAnswer) -> None:
    """Raises CannotResume where another worker could not continue the answer."""
    if not answer.announced:
        return  # it begins anew
    if not answer.only_text or call.hides_tokens:
        raise CannotResume("it contains more than one plain text")
    check_fields(call, _SPENT, _NEUTRAL)
    stops = _stops(call)
    if answer.text_ended and stops and not answer.finish_told:
        raise CannotResume("the stop sequence that ended it is unknown")
    if ends_within(answer.text, stops) and orjson.loads(_member(call, "include_stop_str_in_output", b"false")):
        raise CannotResume("it ends inside a stop sequence")


async def continuation_at(member: Member, call: Call, answer: TypedAnswer) -> TypedContinuation:
    """What `member` is asked for the rest. CannotResume, EngineGone."""
    if not member.worker.token_ids:
        raise CannotResume("the other worker's engine returns no token ids")
    prompt = (await _asked(member, "/tokenize", chat_of(call))).get("tokens")
    if not isinstance(prompt, list) or answer.prompt_tokens not in (None, len(prompt)):
        raise CannotResume("the other worker tokenizes the prompt differently")
    made = await _ids_of(member, call, answer.text)
    limit = call.max_tokens or None
    if answer.text_ended or (limit is not None and len(made) >= limit):
        return TypedContinuation(b"", len(prompt), len(made))
    members = {name: bytes(raw) for name, raw in raw_members(call.body).items()}
    body: dict[str, Any] = {name: orjson.Fragment(raw) for name, raw in members.items() if name in GO_ALONG}
    body |= {
        "prompt": [*prompt, *made],
        "stop": _stops(call),
        "max_tokens": None if limit is None else limit - len(made),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return TypedContinuation(orjson.dumps(body), len(prompt), len(made))


def closing_of(call: Call, answer: TypedAnswer, plan: TypedContinuation) -> bytes:
    """The events that close a stream of which no text is missing."""
    length = bool(call.max_tokens) and plan.made >= call.max_tokens
    made = plan.made if length else plan.made + 1  # the token that ends an answer has no text
    return answer.closing(AnswerEnd(length, None, Usage(plan.prompt_tokens, made, None)))


def _stops(call: Call) -> list[str]:
    sequences = orjson.loads(_member(call, "stop_sequences", b"null"))
    return [*stop_texts(call), *(text for text in sequences or () if isinstance(text, str) and text)]


def _member(call: Call, name: str, default: bytes) -> bytes:
    return bytes(raw_members(call.body).get(name, default))


async def _ids_of(member: Member, call: Call, text: str) -> list[int]:
    """The token ids of the text that the client has. CannotResume if the engine reads them as another text."""
    if not text:
        return []
    asked = {"model": call.model, "prompt": text, "add_special_tokens": False}
    ids = (await _asked(member, "/tokenize", asked)).get("tokens")
    told = await _asked(member, "/detokenize", {"model": call.model, "tokens": ids})
    if not isinstance(ids, list) or told.get("prompt") != text:
        raise CannotResume("its text does not match its token ids")
    return ids


async def _asked(member: Member, path: str, body: object) -> Json:
    answer = await member.engine.post(path, body)
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.status_code != 200 or not isinstance(content, dict):
        raise CannotResume(f"the other worker answers {path} with {answer.status_code}")
    return content


class Teller(Protocol):
    """What another worker's events say, and what becomes of them for the client."""

    def read(self, event: bytes) -> Said: ...

    def told(self, event: bytes, said: Said) -> bytes:
        """Empty if the client gets nothing of it. ValueError, TypeError, AttributeError, LookupError if it is none."""


class Retold(Rest):
    """The rest of an answer as a teller retells it. What is kept is what the client gets."""

    __slots__ = ("teller",)

    def __init__(
        self, ticket: Ticket, out: ClientAnswer, itl: Distribution, charge: list[Ticket], teller: Teller
    ) -> None:
        super().__init__(ticket, out, itl, charge)
        self.teller = teller

    def read(self, event: bytes) -> Said:
        return self.teller.read(event)

    def _shown(self, event: bytes, said: Said) -> bytes:
        try:
            shown = self.teller.told(event, said)
        except (ValueError, TypeError, AttributeError, LookupError):
            self.fail(EngineGone("The engine sent an event that is not part of its API."))
            return b""
        if shown:
            self.kept.add(shown)
        return shown


class BegunAnew:
    """The whole answer of another worker, for a client that has no more than its opening events."""

    def __init__(self, dialect: Dialect, answer: TypedAnswer) -> None:
        self._dialect = dialect
        self._answer = answer

    def read(self, event: bytes) -> Said:
        return read_event(self._dialect, event)

    def told(self, event: bytes, said: Said) -> bytes:
        data = data_of(as_published(event) if said.response else event)
        return self._answer.retold(orjson.loads(data)) if data else b""


class Continued:
    """Another worker's completion of what the client has, as events of the first worker's stream."""

    def __init__(self, ticket: Ticket, answer: TypedAnswer, plan: TypedContinuation) -> None:
        self._ticket = ticket
        self._answer = answer
        self._plan = plan
        self._reason = ""
        self._stop: str | None = None
        self._usage = Usage(plan.prompt_tokens, None, None)

    def read(self, event: bytes) -> Said:
        said, plan = read_event(COMPLETIONS.dialect, event), self._plan
        if said.usage is None or said.usage.output_tokens is None:
            return said._replace(prompts=())
        cached = None if said.usage.cached_tokens is None else min(said.usage.cached_tokens, plan.prompt_tokens)
        usage = Usage(plan.prompt_tokens, plan.made + said.usage.output_tokens, cached)
        return said._replace(usage=usage, prompts=())

    def told(self, event: bytes, said: Said) -> bytes:
        if said.usage is not None:
            self._usage = said.usage
        if said.last:
            return self._closed()
        data = data_of(event)
        if not data:
            return b""
        text = ""
        for choice in orjson.loads(data).get("choices") or ():
            text += choice.get("text") or ""
            self._reason = choice.get("finish_reason") or self._reason
            self._stop = choice["stop_reason"] if isinstance(choice.get("stop_reason"), str) else self._stop
        return self._answer.delta(text) if text else b""

    def _closed(self) -> bytes:
        if not self._reason:
            raise ValueError("it ended without a reason")
        usage = self._usage
        if usage.output_tokens is None:
            usage = Usage(self._plan.prompt_tokens, self._ticket.tokens, None)
        return self._answer.closing(AnswerEnd(self._reason == "length", self._stop, usage))
