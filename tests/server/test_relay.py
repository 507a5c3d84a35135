"""The pipe: whatever the pieces in which an engine's bytes come, the client gets the same and the count is the same."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.answers import Said
from server.failover.resume import Resumed, continuation
from server.observe.telemetry import Distribution
from server.relay.relay import Stream, Whole
from server.request.call import Phase, Ticket
from server.request.errors import EngineGone, Refused, ServiceError
from server.request.schemas import CHAT, COMPLETIONS, MESSAGES
from server.request.transcript import PACK_CHUNKS, Chunk, Transcript, TranscriptProgress
from tests.server.calls import call_of, ticket_of


class Client:
    """The way back, as a recording."""

    def __init__(self) -> None:
        self.begun = False
        self.ended = False
        self.head: tuple[int, bytes, int | None] | None = None
        self.pieces: list[bytes] = []
        self.forwarded = 0

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        assert not self.begun
        self.begun = True
        self.head = (status, content_type, length)

    def write(self, data: bytes) -> None:
        assert self.begun and not self.ended and data
        self.pieces.append(data)

    def forward(self, chunk: bytes, at: int) -> None:
        self.write(chunk[at:-2])
        self.forwarded += 1

    def end(self) -> None:
        assert self.begun and not self.ended
        self.ended = True

    def flows_from(self, connection: object) -> None:
        pass

    @property
    def got(self) -> bytes:
        return b"".join(self.pieces)


class Ticks:
    """A clock that moves a hundredth of a second with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def event(content: str | None = None, *, ids: list[int] | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    choices = [] if content is None else [choice | ({} if ids is None else {"token_ids": ids})]
    return b"data: " + json.dumps({"choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TEXTS = (
    "Hi",
    ' "usage": {"completion_tokens": 99}',
    "\n\ndata: x",
    "é",
    ' [DONE]"finish_reason":null,"token_ids":[7]}]}',
)
TOKENS = [event(text, ids=[number]) for number, text in enumerate(TEXTS, start=1000)]
UNTOLD = [event(text) for text in ("Hi", ' "usage":', "\n\ndata: x", "é", " [DONE]")]  # by an engine without token ids
USAGE = event(usage={"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}})
DONE = b"data: [DONE]\n\n"
STREAM = ROLE + b"".join(TOKENS) + USAGE + DONE
SHOWN = ROLE + b"".join(TOKENS) + DONE


async def streamed(
    pieces: list[bytes],
    *,
    asked: bool = False,
    end: bool = True,
    framed: bool = False,
    content_type: bytes = b"text/event-stream; charset=utf-8",
) -> tuple[Client, Ticket, Stream, list[Ticket]]:
    options = b',"stream_options":{"include_usage":true}' if asked else b""
    ticket = ticket_of(Ticks(), call_of(b'{"model":"m","stream":true' + options + b"}"))
    ticket.move(Phase.PREFILLING)
    client, charge = Client(), list[Ticket]()
    stream = Stream(ticket, client, Distribution("itl", ""), charge)
    stream.head(200, content_type, None)
    for piece in pieces:
        if framed:
            stream.chunk(b"%x\r\n%b\r\n" % (len(piece), piece), len(b"%x\r\n" % len(piece)))
        else:
            stream.body(piece)
    if end:
        stream.end()
    return client, ticket, stream, charge


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % len(data) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("said", [[], [ROLE]], ids=["nothing", "the role"])
async def test_an_engine_that_ends_before_its_first_token_has_not_answered(said: list[bytes]) -> None:
    """vLLM leaves out the event with `abort` of an answer that it aborts before the first token."""
    _, _, stream, _ = await streamed([*said, DONE], end=False)
    assert isinstance(stream.done.exception(), EngineGone)


async def test_nor_has_one_that_was_asked_for_the_rest_of_an_answer() -> None:
    call = call_of(b'{"model":"m","stream":true,"messages":[]}')
    ticket = ticket_of(Ticks(), call)
    ticket.move(Phase.PREFILLING)
    client = Client()
    client.begun = True
    ticket.received = Transcript()
    had = TranscriptProgress({"id": "c"}, [1, 2], [Chunk([10], "Hi")], "Hi")
    rest = Resumed(ticket, client, Distribution("itl", ""), [], continuation(call, had, [10], "Hi"))
    rest.head(200, b"text/event-stream", None)
    rest.body(DONE)
    assert isinstance(rest.done.exception(), EngineGone) and not client.got


@given(st.lists(st.integers(0, len(STREAM)), max_size=40), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_of_a_stream_gives_the_same_bytes_and_the_same_count(
    places: list[int], asked: bool, crlf: bool, framed: bool
) -> None:
    data = STREAM.replace(b"\n", b"\r\n") if crlf else STREAM
    client, ticket, _, charge = asyncio.run(streamed(cut(data, places), asked=asked, framed=framed))
    assert client.got == (STREAM if asked else SHOWN)
    assert all(piece.endswith(b"\n\n") for piece in client.pieces), "an event was torn apart"
    assert (ticket.prompt_tokens, ticket.tokens, ticket.cached_tokens, ticket.exact) == (12, 5, 4, True)
    assert charge == [ticket] and ticket.uncharged == 5
    assert client.ended


async def test_an_event_with_one_token_is_forwarded_with_its_framing_and_counted_like_any_other() -> None:
    client, ticket, stream, charge = await streamed([ROLE, *TOKENS, USAGE, DONE], framed=True)
    assert client.forwarded == len(TOKENS) - 2, "all but the two that show what is to come"
    assert client.got == SHOWN and ticket.tokens == 5 and charge == [ticket]
    assert stream.received is not None and stream.received.events() == STREAM


@pytest.mark.parametrize("ids", [True, False])
async def test_what_an_ordinary_event_looks_like_is_learned_and_what_is_not_one_is_read(ids: bool) -> None:
    def token(number: int, **more: object) -> bytes:
        return event(f"t{number}", ids=[number] if ids else None, **more)

    usual = [token(number) for number in range(10, 20)]
    three = event("one two three", ids=[1, 2, 3]) if ids else event("0123456789" * 4)
    unusual = [token(20, usage={"completion_tokens": 99, "prompt_tokens": 3}), three]
    client, ticket, _, _ = await streamed([ROLE, *usual, *unusual, token(21)], framed=True, end=False)
    assert client.got == ROLE + b"".join([*usual, *unusual, token(21)])
    assert client.forwarded == 8 + 1 + ids, "an event of three tokens with their ids is ordinary, too"
    assert ticket.tokens == (10 + 1 + 3 + 1 if ids else 99 + 10 + 1)


async def test_an_event_with_a_prompt_s_ids_is_no_pattern_for_others() -> None:
    """vLLM tells the prompt's ids with the first event of each choice of a completion."""

    def first(choice: int, text: str) -> bytes:
        told = f'"index":{choice},"text":"{text}","finish_reason":null,"prompt_token_ids":[1,2,3],"token_ids":[7]'
        return b'data: {"id":"c","choices":[{%b}]}\n\n' % told.encode()

    client, ticket, _, _ = await streamed([first(0, "a"), first(1, "b")], framed=True, end=False)
    assert client.got.count(b'"prompt_token_ids":null') == 2 and ticket.tokens == 2


async def test_ordinary_events_of_several_tokens_are_counted_by_their_ids() -> None:
    """`stream_interval` and speculative decoding put many tokens into an event."""
    pieces = [event("x", ids=list(range(at, at + 50))) for at in range(0, 800, 50)]
    client, ticket, _, _ = await streamed([ROLE, *pieces], framed=True, end=False)
    assert client.got == ROLE + b"".join(pieces)
    assert ticket.tokens == ticket.uncharged == 800


async def test_an_event_that_only_ends_like_an_ordinary_one_is_read() -> None:
    usual = [event("t", ids=[number]) for number in range(5)]
    error = b'data: {"error":{"message":"x","code":500},"choices":[{"finish_reason":null,"token_ids":[1]}]}\n\n'
    client, ticket, stream, _ = await streamed([ROLE, *usual, error + error], framed=True, end=False)
    with pytest.raises(Refused):
        await stream.done
    assert client.got == ROLE + b"".join(usual) and ticket.tokens == 5


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("ids", [False, True])
async def test_an_event_with_an_error_before_an_ordinary_end_is_read(ids: bool, framed: bool, together: bool) -> None:
    usual = [event("t", ids=[number] if ids else None) for number in range(5)]
    error = usual[0].replace(b'"choices"', b'"error":{"message":"x","code":500},"choices"')
    pieces = [b"".join([*usual, error])] if together else [*usual, error]
    client, ticket, stream, _ = await streamed([ROLE, *pieces], framed=framed, end=False)
    with pytest.raises(Refused):
        await stream.done
    assert client.got == ROLE + b"".join(usual) and ticket.tokens == 5


async def test_of_many_events_in_one_read_only_those_that_are_not_ordinary_are_read() -> None:
    usual = [event("t", ids=[number, number]) for number in range(100)]
    said: list[bytes] = []

    class Reading(Stream):
        def read(self, event: bytes) -> Said:
            said.append(event)
            return super().read(event)

    ticket = ticket_of(Ticks(), call_of(b'{"model":"m","stream":true}'))
    ticket.move(Phase.PREFILLING)
    stream = Reading(ticket, client := Client(), Distribution("itl", ""), [])
    stream.head(200, b"text/event-stream", None)
    stream.body(b"".join([ROLE, *usual, USAGE, DONE]))
    stream.end()
    assert client.got == b"".join([ROLE, *usual, DONE]) and len(said) == 4
    assert ticket.uncharged == ticket.tokens == 5, "the engine's own count"
    assert stream.received is not None and stream.received.events() == b"".join([ROLE, *usual, USAGE, DONE])


@pytest.mark.parametrize("framed", [True, False])
async def test_what_is_kept_of_a_long_stream_is_packed_whichever_way_it_comes(framed: bool) -> None:
    long = [ROLE, *(TOKENS[0] for _ in range(3 * PACK_CHUNKS))]
    client, ticket, stream, _ = await streamed(long, framed=framed, end=False)
    assert ticket.tokens == 3 * PACK_CHUNKS and client.got == b"".join(long)
    assert len(stream.chunks) < PACK_CHUNKS
    assert stream.received is not None and stream.received.events() == b"".join(long)


async def test_every_byte_on_its_own_gives_the_same_stream() -> None:
    client, ticket, _, _ = await streamed([STREAM[at : at + 1] for at in range(len(STREAM))])
    assert client.got == SHOWN and ticket.tokens == 5


@pytest.mark.parametrize("events", [TOKENS, UNTOLD])
@pytest.mark.parametrize("made", range(len(TOKENS) + 1))
async def test_tokens_are_counted_before_the_engine_tells_its_own_count(made: int, events: list[bytes]) -> None:
    _, ticket, _, _ = await streamed([ROLE, *events[:made]], end=False)
    assert ticket.tokens == ticket.uncharged == made
    assert not ticket.exact


async def test_each_choice_of_a_chat_opens_with_an_event_that_is_no_token() -> None:
    ticket = ticket_of(Ticks(), call_of(b'{"model":"m","stream":true,"n":3}'))
    ticket.move(Phase.PREFILLING)
    stream = Stream(ticket, Client(), Distribution("itl", ""), [])
    stream.head(200, b"text/event-stream", None)
    for piece in (ROLE, ROLE, ROLE + TOKENS[0], TOKENS[1]):
        stream.body(piece)
    assert ticket.tokens == 2


async def test_the_prompt_is_known_from_the_first_event_and_its_ids_are_not_shown() -> None:
    ids = ',"prompt_token_ids":[' + ",".join(map(str, range(700))) + "]"
    first = ROLE.replace(b"}}]}", b"}}]" + ids.encode() + b"}")
    client, ticket, stream, _ = await streamed([first, TOKENS[0]], end=False)
    assert ticket.exact and ticket.prompt_tokens == 700
    assert client.got == ROLE.replace(b"}}]}", b'}}],"prompt_token_ids":null}') + TOKENS[0]
    assert stream.received is not None and stream.received.events() == first + TOKENS[0]


async def test_of_several_prompts_those_that_are_not_told_yet_keep_their_estimate() -> None:
    body = b'{"model":"m","stream":true,"n":2,"prompt":["%b","%b"]}' % (b"a" * 400, b"b" * 400)
    ticket = ticket_of(Ticks(), call_of(body, COMPLETIONS))
    ticket.move(Phase.PREFILLING)
    stream = Stream(ticket, Client(), Distribution("itl", ""), [])
    stream.head(200, b"text/event-stream", None)
    estimate = ticket.call.prompt_tokens
    told = b'data: {"choices":[{"index":%d,"text":"x","token_ids":[1],"prompt_token_ids":[1,2,3]}]}\n\n'
    for choice in (2, 3):
        stream.body(told % choice)
        assert ticket.prompt_tokens == 3 + estimate // 2 and not ticket.exact
    stream.body(told % 0)
    assert ticket.prompt_tokens == 6 and ticket.exact


async def test_a_chunk_of_several_tokens_is_corrected_by_the_engines_count() -> None:
    usage = event(usage={"prompt_tokens": 3, "completion_tokens": 40})
    _, ticket, _, _ = await streamed([ROLE, *TOKENS, usage, DONE])
    assert ticket.tokens == ticket.uncharged == 40


async def test_continuous_usage_is_followed_chunk_by_chunk() -> None:
    pieces = [event("x y z", usage={"prompt_tokens": 3, "completion_tokens": 3 * number}) for number in (1, 2, 3)]
    client, ticket, _, _ = await streamed([ROLE, *pieces], end=False)
    assert ticket.tokens == ticket.uncharged == 9
    assert client.got == ROLE + b"".join(pieces), "a chunk with choices is never hidden"


async def test_a_stream_without_usage_keeps_the_count_of_its_events() -> None:
    _, ticket, _, _ = await streamed([ROLE, *TOKENS, DONE])
    assert ticket.tokens == 5 and not ticket.exact


async def test_an_estimate_that_was_too_high_is_corrected_by_the_engine_s_count() -> None:
    usage = event(usage={"prompt_tokens": 3, "completion_tokens": 2})
    _, ticket, _, _ = await streamed([ROLE, event("a" * 100), event("b" * 100), usage, DONE])
    assert ticket.tokens == ticket.uncharged == 2


async def test_the_fingerprint_of_the_usage_event_that_is_not_shown_moves_to_the_one_before() -> None:
    end = TOKENS[-1].replace(b'"finish_reason":null', b'"finish_reason":"stop"')
    usage = USAGE.replace(b'{"choices"', b'{"system_fingerprint":"fp","choices"')
    client, ticket, _, _ = await streamed([ROLE, *TOKENS[:-1], end, usage, DONE])
    assert client.got == ROLE + b"".join(TOKENS[:-1]) + end[:-3] + b',"system_fingerprint":"fp"}\n\n' + DONE
    client, _, _, _ = await streamed([ROLE, *TOKENS[:-1], end, DONE])
    assert client.got == ROLE + b"".join(TOKENS[:-1]) + end + DONE, "an engine without a usage event"
    client, _, stream, _ = await streamed([ROLE, *TOKENS[:-1], end], end=False)
    stream.lost(EngineGone("gone"))
    assert client.got == ROLE + b"".join(TOKENS[:-1]) + end, "what was held is the client's"
    await asyncio.gather(stream.done, return_exceptions=True)


async def test_anthropics_first_usage_does_not_stop_the_count() -> None:
    ticket = ticket_of(Ticks(), call_of(b'{"model":"m","stream":true}', MESSAGES))
    ticket.move(Phase.PREFILLING)
    stream = Stream(ticket, Client(), Distribution("itl", ""), [])
    stream.head(200, b"text/event-stream", None)
    usage = b'{"usage":{"input_tokens":9,"output_tokens":0}}'
    stream.body(b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n' % usage)
    delta = b'event: x\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}\n\n'
    stream.body(b'event: content_block_start\ndata: {"type":"content_block_start"}\n\n' + delta)
    stream.body(delta)
    assert (ticket.prompt_tokens, ticket.tokens) == (9, 2)


async def test_the_gaps_between_chunks_are_observed_but_not_the_first() -> None:
    _, ticket, stream, _ = await streamed([ROLE + TOKENS[0], *TOKENS[1:], USAGE + DONE])
    assert sum(stream.itl.counts) == 5
    assert stream.itl.sum == pytest.approx(ticket.last_at - ticket.times[Phase.DECODING], abs=0.02)  # type: ignore[operator]


@pytest.mark.parametrize("pieces", [[ROLE, *TOKENS], [ROLE + TOKENS[0], *TOKENS[1:]]], ids=["apart", "packed"])
async def test_the_gap_to_the_second_token_is_noted_once(pieces: list[bytes]) -> None:
    _, ticket, stream, _ = await streamed([*pieces, USAGE + DONE])
    assert ticket.second_s is not None and 0 < ticket.second_s <= stream.itl.sum


async def test_a_stream_of_one_token_has_no_second() -> None:
    _, ticket, _, _ = await streamed([ROLE, TOKENS[0], DONE])
    assert ticket.second_s is None


async def test_a_stream_that_ends_without_an_event_is_a_failure() -> None:
    client, _, stream, _ = await streamed([])
    with pytest.raises(EngineGone):
        await stream.done
    assert not client.begun


async def test_an_event_that_the_end_cuts_short_is_completed() -> None:
    client, _, _, _ = await streamed([ROLE, TOKENS[0], DONE[:-2]])
    assert client.got == ROLE + TOKENS[0] + DONE and client.ended


async def test_a_stream_that_ends_without_its_last_event_is_a_failure() -> None:
    client, _, stream, _ = await streamed([ROLE, *TOKENS])
    with pytest.raises(EngineGone):
        await stream.done
    assert not client.ended


async def test_an_event_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.relay.relay.MAX_EVENT_BYTES", 1000)
    _, _, stream, _ = await streamed([b"x" * 300] * 10, end=False)
    assert stream.pieces_bytes <= 1300 and not stream.pieces
    with pytest.raises(EngineGone):
        await stream.done


def whole(client: Client, body: bytes = b'{"model":"m"}') -> Whole:
    ticket = ticket_of(Ticks(), call_of(body, COMPLETIONS))
    ticket.move(Phase.PREFILLING)
    return Whole(ticket, client)


ANSWER = (
    b'{"id":"x","choices":[{"text":"\\"usage\\": {\\"completion_tokens\\": 1}"}],"usage":{"prompt_tokens":3,'
    b'"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":2}},"prompt_token_ids":[' + b"1," * 9000 + b"1]}"
)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_cut_of_a_whole_answer_gives_the_same_bytes_and_the_same_usage(places: list[int]) -> None:
    async def run() -> None:
        client = Client()
        pipe = whole(client)
        pipe.head(200, b"application/json", len(ANSWER))
        for piece in cut(ANSWER, places):
            pipe.body(piece)
        pipe.end()
        await pipe.done
        assert client.got == ANSWER and client.ended and client.head == (200, b"application/json", len(ANSWER))
        assert (pipe.ticket.prompt_tokens, pipe.ticket.tokens, pipe.ticket.cached_tokens) == (3, 7, 2)

    asyncio.run(run())


async def test_an_answer_that_is_too_long_to_be_held_is_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.relay.relay.MAX_HELD_BYTES", 100)
    client = Client()
    pipe = whole(client)
    pipe.head(200, b"application/json", len(ANSWER))
    for at in range(0, len(ANSWER), 50):
        pipe.body(ANSWER[at : at + 50])
        assert client.begun == (at >= 100)
    pipe.end()
    await pipe.done
    assert client.got == ANSWER and not pipe.held
    assert (pipe.ticket.prompt_tokens, pipe.ticket.tokens, pipe.ticket.cached_tokens) == (3, 7, 2)


async def test_an_answer_without_usage_is_not_free() -> None:
    pipe = whole(Client())
    pipe.head(200, b"application/json", 400)
    pipe.body(b'{"choices":[{"text":"%b"}]}' % (b"x" * 400))
    pipe.end()
    await pipe.done
    assert pipe.ticket.tokens > 90 and not pipe.ticket.exact


async def test_an_empty_answer_is_an_answer() -> None:
    client = Client()
    pipe = whole(client)
    pipe.head(200, b"application/json", 0)
    pipe.end()
    await pipe.done
    assert client.begun and client.ended and client.got == b""


@pytest.mark.parametrize("kind", [Whole, Stream])
async def test_a_refusal_is_collected_and_never_forwarded(kind: type[Whole | Stream]) -> None:
    client = Client()
    ticket = ticket_of(Ticks(), call_of(b'{"model":"m"}', CHAT))
    pipe = Whole(ticket, client) if kind is Whole else Stream(ticket, client, Distribution("itl", ""), [])
    pipe.head(400, b"application/json", None)
    for byte in b'{"error":{"message":"This model\'s maximum context length is 9 tokens.","code":400}}':
        pipe.body(bytes([byte]))
    pipe.end()
    with pytest.raises(Refused) as refused:
        await pipe.done
    assert refused.value.refused_status == 400 and refused.value.code == "context_length_exceeded"
    assert not client.begun


async def test_an_error_that_nobody_waits_for_makes_no_noise() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    pipe = whole(Client())
    pipe.lost(EngineGone("gone"))
    pipe.fail(ServiceError("and again"))
    pipe.leave()
    del pipe
    await asyncio.sleep(0)
    assert not complaints
