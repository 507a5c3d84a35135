"""Going on with a stream at another worker: what that worker is asked, and its events in the shape of the first one's.

By token ids: the prompt's and those made so far go to `/v1/completions` as the prompt, so that nothing depends on how a
text is cut into tokens. What an engine would not continue exactly raises `CannotResume`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from server.engine.answers import Said, Usage, data_of
from server.observe.telemetry import Distribution
from server.relay.relay import ClientAnswer, Stream
from server.request.call import Call, Ticket
from server.request.errors import EngineGone, ServiceError
from server.request.schemas import COMPLETIONS, raw_members
from server.request.transcript import Chunk, Transcript, TranscriptProgress

DEFAULT_COMPLETION_TOKENS = 16  # where /v1/completions is asked without a length
_TEXTS = ("text", "input_text", "refusal")
_NEUTRAL: tuple[object, ...] = (None, False, 0, "", [], {})
# Fields that mean the same for the rest of an answer as for the whole of it, and go along.
GO_ALONG = frozenset(
    "model temperature top_p top_k min_p seed repetition_penalty logit_bias stop stop_token_ids ignore_eos "
    "include_stop_str_in_output skip_special_tokens spaces_between_special_tokens allowed_token_ids user cache_salt "
    "priority vllm_xargs stream_interval".split()
)
# Fields that have done their work once the prompt is token ids, or that are written anew.
SPENT = frozenset(
    "messages prompt stream stream_options max_tokens max_completion_tokens min_tokens n add_generation_prompt "
    "continue_final_message add_special_tokens chat_template chat_template_kwargs documents reasoning_effort "
    "include_reasoning truncate_prompt_tokens truncation_side return_token_ids parallel_tool_calls tool_choice store "
    "metadata service_tier session_id top_logprobs best_of prompt_cache_key prompt_cache_retention "
    "safety_identifier".split()
)


class CannotResume(Exception):
    """This stream cannot be continued exactly; the message says why, for the log."""


class Diverged(ServiceError):
    """The other worker does not say again what the client has already: an error that no third worker mends."""

    status = 502
    code = "engine_gone"


@dataclass(frozen=True, slots=True)
class Continuation:
    """The request for the rest of a stream, as another worker gets it.

    kept: what of the progress it builds upon; the tokens of the last incomplete character, for one, are made again.
    skip, skip_ids: text and token ids that the client has and that this worker will say again. restart: the client's
    own request once more, since it has nothing but the role.
    """

    path: bytes
    body: bytes
    kept: TranscriptProgress
    skip: str = ""
    skip_ids: Sequence[int] = ()
    restart: bool = False


def kept_of(ticket: Ticket) -> Transcript:
    """What has been kept of a stream. CannotResume if that is not all of it."""
    if ticket.received is None:
        raise CannotResume(f"{ticket.call.route.path} is not kept")
    if ticket.received.full:
        raise CannotResume("it is too long to be kept")
    return ticket.received


def check_fields(call: Call, spent: frozenset[str], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """CannotResume for a field that the rest of an answer could not keep to by itself.

    spent: those that have done their work. neutral: values of fields with which they ask for nothing.
    """
    for name, raw in raw_members(call.body).items():
        if name in GO_ALONG or name in spent:
            continue
        value = orjson.loads(bytes(raw))
        if value not in _NEUTRAL and value not in neutral.get(name, ()):
            raise CannotResume(f"{name[:64]!r} depends on the whole answer")


def fit_to_resume(call: Call, progress: TranscriptProgress) -> None:
    """Raises CannotResume where an engine could not continue exactly."""
    if not progress.only_text or call.sequences > 1:
        raise CannotResume("it contains more than one plain text")
    if progress.prompt_ids is None or progress.ids is None:
        raise CannotResume("its engine returns no token ids")
    check_fields(call, SPENT, {"response_format": ({"type": "text"},)})
    if not _text_only(call):
        raise CannotResume("its prompt is not text alone")


def _text_only(call: Call) -> bool:
    """Whether a chat's messages are all text, as far as they can be read."""
    if not call.route.chat:
        return True
    messages = orjson.loads(bytes(raw_members(call.body).get("messages", b"[]")))
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return all(isinstance(part, str) or (isinstance(part, dict) and part.get("type") in _TEXTS) for part in parts)


def clean_length(chunks: Sequence[Chunk], *, stops: bool) -> int | None:
    """The number of chunks whose tokens have produced all of their text: an engine holds back incomplete characters.
    None if the chunks do not show it: an engine also holds back text that could become a stop string, and a chunk may
    hold many tokens."""
    length = len(chunks)
    while length and not chunks[length - 1].text:
        length -= 1
    if length and (stops or len(chunks[length - 1].ids or ()) != 1):
        return None
    return length


def stop_texts(call: Call) -> list[str]:
    """The texts at which the client wants the answer to end."""
    stop = orjson.loads(bytes(raw_members(call.body).get("stop", b"null")))
    texts = stop if isinstance(stop, list) else [stop]
    return [text for text in texts if isinstance(text, str) and text]


def ends_within(text: str, stops: Sequence[str]) -> bool:
    """Whether a text ends with the beginning of one of these, but not with the whole of it."""
    return any(text.endswith(stop[:length]) for stop in stops for length in range(1, len(stop)))


def continuation(call: Call, progress: TranscriptProgress, kept_ids: list[int], kept_text: str) -> Continuation:
    """What another worker is asked, where `kept_ids` say `kept_text`. CannotResume."""
    assert progress.prompt_ids is not None  # fit_to_resume has seen to it
    members = {name: bytes(raw) for name, raw in raw_members(call.body).items()}
    body: dict[str, Any] = {name: orjson.Fragment(raw) for name, raw in members.items() if name in GO_ALONG}
    body["prompt"] = [*progress.prompt_ids, *kept_ids]
    body["stream"] = body["return_token_ids"] = True
    body["stream_options"] = orjson.Fragment(members.get("stream_options", b'{"include_usage":true}'))
    body["max_tokens"] = _left(call, members, len(kept_ids))
    least = orjson.loads(members.get("min_tokens", b"0")) or 0
    body["min_tokens"] = max(0, least - len(kept_ids))
    chunks = [Chunk(kept_ids, kept_text)] if kept_ids else []
    kept = TranscriptProgress(progress.head, progress.prompt_ids, chunks, progress.told, told_ids=progress.told_ids)
    skip, skip_ids = progress.told[len(kept_text) :], progress.told_ids[len(kept_ids) :]
    return Continuation(COMPLETIONS.path.encode(), orjson.dumps(body), kept, skip, skip_ids)


def _left(call: Call, members: dict[str, bytes], made: int) -> int | None:
    """Tokens that may still be made; None for as many as the context holds."""
    limit: int | None = None
    if call.route is COMPLETIONS:
        limit = orjson.loads(members.get("max_tokens", str(DEFAULT_COMPLETION_TOKENS)))
    elif call.max_tokens:
        limit = call.max_tokens
    return None if limit is None else max(1, limit - made)


def restart(call: Call, progress: TranscriptProgress) -> Continuation:
    """The request once more, for a client that has no more than the role."""
    return Continuation(call.route.path.encode(), call.body, TranscriptProgress(progress.head), restart=True)


def has_said_nothing(progress: TranscriptProgress) -> bool:
    """Whether the client has no more than who speaks."""
    return not progress.chunks and progress.only_text and not progress.told


def closing(call: Call, progress: TranscriptProgress) -> bytes:
    """The events that close a stream whose last token the client has. CannotResume if its usage is not known."""
    if progress.said_done:
        return b""
    done = b"data: [DONE]\n\n"
    if call.hide_usage or progress.said_usage:
        return done
    if progress.prompt_ids is None or (ids := progress.ids) is None:
        raise CannotResume("its usage is not known")
    prompt, made = len(progress.prompt_ids), len(ids)
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made}
    return b"data: " + orjson.dumps({**progress.head, "choices": [], "usage": usage}) + b"\n\n" + done


class Rest(Stream):
    """The rest of a stream from another worker. Subclasses convert its events, and keep the state they need for
    that."""

    keeps_events = False
    __slots__ = ("kept",)

    def __init__(self, ticket: Ticket, out: ClientAnswer, itl: Distribution, charge: list[Ticket]) -> None:
        super().__init__(ticket, out, itl, charge)
        self.kept = kept_of(ticket)

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        super().head(status, content_type, length)
        if self.instead is not None and 200 <= status < 300:
            self.fail(EngineGone("The engine does not stream the rest of the answer."))

    def body(self, data: bytes) -> None:
        if not self.done.done():
            super().body(data)


class Resumed(Rest):
    """The rest of an answer, said by another worker: each event becomes one of the first worker's stream.

    What is kept are this worker's own events, not what they become.
    """

    __slots__ = ("plan", "skip", "skip_ids", "chat", "made_before", "prompt_tokens")

    def __init__(
        self, ticket: Ticket, out: ClientAnswer, itl: Distribution, charge: list[Ticket], plan: Continuation
    ) -> None:
        super().__init__(ticket, out, itl, charge)
        self.plan = plan
        self.skip = plan.skip
        self.skip_ids = plan.skip_ids
        self.chat = ticket.call.route.chat
        self.made_before = 0 if plan.restart else len(plan.kept.ids or ())
        self.prompt_tokens = None if plan.restart or plan.kept.prompt_ids is None else len(plan.kept.prompt_ids)

    def read(self, event: bytes) -> Said:
        """What the event says of the whole request: what an earlier worker made is output, not prompt."""
        said = super().read(event)
        if self.prompt_tokens is None:
            return said
        usage = said.usage
        if usage is not None and usage.output_tokens is not None:
            cached = None if usage.cached_tokens is None else min(usage.cached_tokens, self.prompt_tokens)
            usage = Usage(self.prompt_tokens, self.made_before + usage.output_tokens, cached)
        again = min(said.tokens, len(self.skip_ids)) if said.exact else 0
        return said._replace(usage=usage, tokens=said.tokens - again, prompts=())

    def _keep(self, events: bytes) -> None:
        self.kept.add(events)

    def _shown(self, event: bytes, said: Said) -> bytes:
        try:
            event = self._rewritten(event, said)
        except (ValueError, TypeError, AttributeError, KeyError, LookupError):
            self.fail(EngineGone("The engine sent an event that is not part of OpenAI's API."))
            return b""
        return b"" if not event or self.done.done() else super()._shown(event, said)

    def _rewritten(self, event: bytes, said: Said) -> bytes:
        data = data_of(event)
        if said.last or not data:
            return event
        content = orjson.loads(data) | self.plan.kept.head
        content.pop("prompt_token_ids", None)
        self._add_up(content)
        choices = map(self._choice, content.get("choices") or ())
        content["choices"] = [choice for choice in choices if choice is not None]
        return b"data: " + orjson.dumps(content) if content["choices"] or said.closing else b""

    def _add_up(self, said: dict[str, Any]) -> None:
        """The usage of the whole request: what an earlier worker made is output, not prompt."""
        usage = said.get("usage")
        if usage and self.prompt_tokens is not None:
            usage["completion_tokens"] = made = self.made_before + (usage.get("completion_tokens") or 0)
            usage["prompt_tokens"] = self.prompt_tokens
            usage["total_tokens"] = self.prompt_tokens + made
            details = usage.get("prompt_tokens_details")
            if details and details.get("cached_tokens"):
                details["cached_tokens"] = min(details["cached_tokens"], self.prompt_tokens)

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """A choice as the client knows them; None if it holds nothing that is new to the client."""
        if self.plan.restart:
            return choice if "delta" not in choice or not choice["delta"].get("role") else None
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        text = self._unsaid(choice.get("text") or "", ends=bool(choice.get("finish_reason")))
        if ids := choice.get("token_ids"):
            ids = choice["token_ids"] = self._untold(ids)
        if self.chat:
            del choice["text"]
            choice.pop("prompt_token_ids", None)
            if not choice.get("finish_reason"):
                choice.pop("stop_reason", None)
            choice = {"index": choice["index"], "delta": {"content": text}, **choice}
        else:
            choice["text"] = text
        return choice if text or ids or choice.get("finish_reason") else None

    def _untold(self, ids: list[int]) -> list[int]:
        """`ids` without those that the client has already: their text had not come."""
        again = min(len(ids), len(self.skip_ids))
        if ids[:again] != list(self.skip_ids[:again]) and self.ticket.call.wants_ids:
            self.fail(Diverged("The engine failed, and no other engine reproduced the token ids that the client has."))
        self.skip_ids = self.skip_ids[again:]
        return ids[again:]

    def _unsaid(self, text: str, *, ends: bool) -> str:
        """`text` without what the client has already."""
        if not self.skip:
            return text
        again = min(len(text), len(self.skip))
        if text[:again] != self.skip[:again] or (ends and again < len(self.skip)):
            self.fail(Diverged("The engine failed, and no other could continue the answer exactly."))
            return ""
        self.skip = self.skip[again:]
        return text[again:]
