"""Continuing a stream of /v1/responses or /v1/messages at another worker.

Their events carry no token ids, so the text that the client has is what both workers know. The other worker tokenizes
the prompt and that text, and completes the two; its completion becomes the rest of the first worker's stream. This is
exact wherever a text has the token ids that were sampled for it, which is the rule for trained models; where not, it is
an answer that the model may give after the same text.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from server.engine.answers import NOTHING, Said, Usage, as_incomplete, data_of, read_event
from server.fleet.fleet import Member
from server.observe.telemetry import Distribution
from server.relay.relay import ClientAnswer, Stream
from server.relay.resume import GO_ALONG, NEUTRAL, SPENT, CannotResume, ends_within, stop_texts
from server.relay.typed_answers import AnswerEnd, Json, TypedAnswer, typed_answer
from server.relay.typed_prompt import chat_of
from server.request.call import Call, Ticket
from server.request.errors import EngineGone
from server.request.schemas import COMPLETIONS, raw_members
from server.request.transcript import PACK_CHUNKS

# What only these two APIs have, and what has done its work once the prompt is rendered.
_SPENT = SPENT | frozenset(
    "input instructions system max_output_tokens max_tool_calls truncation stop_sequences cache_control".split()
)
_NEUTRAL_HERE: dict[str, tuple[Json, ...]] = {
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
    transcript = ticket.received
    if transcript is None:
        raise CannotResume(f"{ticket.call.route.path} is not kept")
    if transcript.full:
        raise CannotResume("it is too long to be kept")
    try:
        return typed_answer(ticket.call.route.dialect, transcript)
    except ValueError as error:
        raise CannotResume(str(error)) from None


def fit_to_continue(call: Call, answer: TypedAnswer) -> None:
    """Raises CannotResume where another worker could not continue the answer."""
    if not answer.announced:
        return  # it begins anew
    if not answer.only_text or call.hides_tokens:
        raise CannotResume("it contains more than one plain text")
    for name, raw in raw_members(call.body).items():
        if name in GO_ALONG or name in _SPENT:
            continue
        value = orjson.loads(bytes(raw))
        if value not in NEUTRAL and value not in _NEUTRAL_HERE.get(name, ()):
            raise CannotResume(f"{name[:64]!r} depends on the whole answer")
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


class _Rest(Stream):
    """The rest of an answer, told by another worker. What is kept is what the client gets."""

    keeps_events = False
    __slots__ = ("answer", "transcript")

    def __init__(
        self, ticket: Ticket, out: ClientAnswer, itl: Distribution, charge: list[Ticket], answer: TypedAnswer
    ) -> None:
        super().__init__(ticket, out, itl, charge)
        self.answer = answer
        self.transcript = ticket.received

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        super().head(status, content_type, length)
        if self.instead is not None and 200 <= status < 300:
            self.fail(EngineGone("The engine does not stream the rest of the answer."))

    def body(self, data: bytes) -> None:
        if not self.done.done():
            super().body(data)

    def _shown(self, event: bytes, said: Said) -> bytes:
        try:
            shown = self._told(event, said)
        except (ValueError, TypeError, AttributeError, LookupError):
            self.fail(EngineGone("The engine sent an event that is not part of its API."))
            return b""
        if shown and self.transcript is not None:
            self.transcript.chunks.append(shown)
            if len(self.transcript.chunks) >= PACK_CHUNKS:
                self.transcript.pack()
        return shown

    def _told(self, event: bytes, said: Said) -> bytes:
        raise NotImplementedError


class BegunAnew(_Rest):
    """The whole answer of another worker, for a client that has no more than its opening events."""

    __slots__ = ()

    def _told(self, event: bytes, said: Said) -> bytes:
        data = data_of(as_incomplete(event) if said.cut else event)
        return self.answer.retold(orjson.loads(data)) if data else b""


class Continued(_Rest):
    """Another worker's completion of what the client has, as events of the first worker's stream."""

    __slots__ = ("plan", "reason", "stop", "usage")

    def __init__(
        self,
        ticket: Ticket,
        out: ClientAnswer,
        itl: Distribution,
        charge: list[Ticket],
        answer: TypedAnswer,
        plan: TypedContinuation,
    ) -> None:
        super().__init__(ticket, out, itl, charge, answer)
        self.plan = plan
        self.reason = ""
        self.stop: str | None = None
        self.usage = Usage(plan.prompt_tokens, None, None)

    def read(self, event: bytes) -> Said:
        said = read_event(COMPLETIONS.dialect, event)
        if said.usage is None or said.usage.output_tokens is None:
            return said._replace(prompts=())
        cached = None if said.usage.cached_tokens is None else min(said.usage.cached_tokens, self.plan.prompt_tokens)
        usage = Usage(self.plan.prompt_tokens, self.plan.made + said.usage.output_tokens, cached)
        return said._replace(usage=usage, prompts=())

    def _told(self, event: bytes, said: Said) -> bytes:
        if said.usage is not None:
            self.usage = said.usage
        if said.last:
            return self._closed()
        if said is NOTHING:
            return b""
        text = ""
        for choice in orjson.loads(data_of(event)).get("choices") or ():
            text += choice.get("text") or ""
            self.reason = choice.get("finish_reason") or self.reason
            self.stop = choice["stop_reason"] if isinstance(choice.get("stop_reason"), str) else self.stop
        return self.answer.delta(text) if text else b""

    def _closed(self) -> bytes:
        if not self.reason:
            raise ValueError("it ended without a reason")
        usage = self.usage
        if usage.output_tokens is None:
            usage = Usage(self.plan.prompt_tokens, self.ticket.tokens, None)
        return self.answer.closing(AnswerEnd(self.reason == "length", self.stop, usage))
