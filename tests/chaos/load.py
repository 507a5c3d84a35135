"""Clients that know what the undisturbed answer is, and compare every answer with it."""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.server.conftest import Reply, Wire, chat, completion, request

log = logging.getLogger("tests.chaos.load")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BROKEN = (AssertionError, OSError, EOFError, ValueError, KeyError, TimeoutError)  # what a wrong answer raises


@dataclass(frozen=True)
class Question:
    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


def questions(seed: int, *, count: int = 16, least: int = 5, most: int = 120, whole: int = 4) -> list[Question]:
    """Chats and completions of `least` to `most` tokens; every `whole`-th is no stream (0: all are streams)."""
    dice = random.Random(seed)
    asked = []
    for number in range(count):
        path, make = dice.choice([(CHAT, chat), (COMPLETIONS, completion)])
        fields: dict[str, Any] = {"max_tokens": dice.randrange(least, most)}
        text = f"Question {number} of {seed}: " + "why? " * dice.randrange(30)
        fields |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        if not whole or number % whole:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        asked.append(Question(path, make(**fields)))
    return asked


Told = list[Any]  # what an answer says: how it differs from another is seen in its first part; its usage


def told(question: Question, reply: Reply) -> Told:
    """What an answer says, without what differs between two runs: ids and times. AssertionError if it is ill-formed."""
    assert reply.status == 200, reply.body[:300]
    if not question.stream:
        answer = reply.json()
        return [[{**choice} for choice in answer["choices"]], answer["usage"]]
    *events, usage, done = reply.events
    assert done == "[DONE]" and usage["choices"] == []
    assert len({event["id"] for event in events}) == 1, "one stream has one id"
    choices = [choice for event in events for choice in event["choices"]]
    assert sum(bool(choice.get("delta", {}).get("role")) for choice in choices) == (question.path == CHAT)
    assert [choice for choice in choices if choice["finish_reason"]] == choices[-1:], "one end, at the end"
    return [choices, usage["usage"]]


def told_by_a_model(question: Question, reply: Reply) -> Told:
    """The same of a real engine, which may put several tokens into a chunk: text, token ids, end; and usage."""
    choices, usage = told(question, reply)
    said = [choice.get("delta") or choice.get("message") or {"content": choice.get("text")} for choice in choices]
    text = "".join(one.get("content") or "" for one in said)
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    return [[text, ids, choices[-1]["finish_reason"]], usage]


def first_difference(said: Told, expected: Told) -> str:
    for at, (one, other) in enumerate(zip(said[0], expected[0], strict=False)):
        if one != other:
            return f"choice {at} is {one} in place of {other}"
    return f"{len(said[0])} choices, {said[1]} in place of {len(expected[0])}, {expected[1]}"


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which a stream said nothing, on the monotonic clock."""

    began: float
    ended: float

    @property
    def s(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Heard:
    """When a request's stream was silent: between any two of its chunks."""

    request_id: str
    pauses: tuple[Pause, ...]

    @property
    def longest_s(self) -> float:
        return max((pause.s for pause in self.pauses), default=0.0)

    def around(self, began: float, ended: float) -> Pause | None:
        """Its longest silence that meets this time, None if it had ended or not begun."""
        met = [pause for pause in self.pauses if pause.began <= ended and pause.ended >= began]
        return max(met, key=lambda pause: pause.s, default=None)


@dataclass(frozen=True, slots=True)
class Other:
    """A well-formed answer that is not the undisturbed one. problem: how it differs."""

    question: Question
    said: Told
    problem: str
    request_id: str


@dataclass
class Seen:
    """What the clients saw.

    answers: by outcome. wrong: what was wrong with an answer that was not the undisturbed one. others: such answers, if
    they are to be judged later. tokens: prompts and answers together, as the usages say. longest_s: the longest that
    any answer took.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    streams: list[Heard] = field(default_factory=list)
    tokens: int = 0
    longest_s: float = 0.0

    @property
    def asked(self) -> int:
        return self.answers.total()


async def listen(wire: Wire) -> tuple[Reply, Heard]:
    """An answer, and its silences."""
    reply = await wire.head()
    request_id = reply.headers["x-request-id"]
    if reply.headers.get("transfer-encoding") != "chunked":
        reply.body = await wire.reader.readexactly(int(reply.headers["content-length"]))
        return reply, Heard(request_id, ())
    pieces, times = [], [time.monotonic()]
    while piece := await wire.chunk():
        pieces.append(piece)
        times.append(time.monotonic())
    reply.body = b"".join(pieces)
    return reply, Heard(request_id, tuple(map(Pause, times, times[1:])))


async def told_on_its_own(port: int, data: bytes) -> tuple[Reply, Heard]:
    """What is answered to a request's bytes on a connection of their own."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
    try:
        await wire.send(data)
        return await listen(wire)
    finally:
        await wire.close()


Tell = Callable[[Question, Reply], Told]


class Client:
    """Asks the questions, any of them at a time, with a key if it has one.

    judged: an answer that is well formed and not the undisturbed one is not wrong, but waits to be judged.
    """

    def __init__(
        self, asked: list[Question], seed: int, *, key: str = "", tell: Tell = told, judged: bool = False
    ) -> None:
        self.questions = asked
        self.told = tell
        self.judged = judged
        self.dice = random.Random(seed)
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.expected: list[Told] = []
        self.kept = 0  # requests on a connection that had carried one before
        self.seen = Seen()

    async def learn(self, port: int) -> None:
        """What the undisturbed answers are."""
        for asked in self.questions:
            reply, _ = await told_on_its_own(port, self._bytes(asked))
            self.expected.append(self.told(asked, reply))

    def _bytes(self, asked: Question) -> bytes:
        return request(asked.path, asked.body, headers=self.headers)

    async def ask(self, port: int) -> None:
        """One question on a connection of its own; what comes of it is in `seen`."""
        await self._ask(partial(told_on_its_own, port))

    async def _ask(self, tell: Callable[[bytes], Awaitable[tuple[Reply, Heard]]]) -> Reply | None:
        number = self.dice.randrange(len(self.questions))
        asked, began, reply = self.questions[number], time.monotonic(), None
        try:
            reply, heard = await tell(self._bytes(asked))
            said = self.told(asked, reply)
            problem = "" if said == self.expected[number] else first_difference(said, self.expected[number])
            outcome = "right" if not problem else "other" if self.judged else "wrong"
            self.seen.tokens += said[1]["total_tokens"]
            if asked.stream:
                self.seen.streams.append(heard)
            if outcome == "other":
                self.seen.others.append(Other(asked, said, problem, heard.request_id))
        except BROKEN as error:
            outcome, problem = "wrong", repr(error)
        self.seen.answers[outcome] += 1
        self.seen.longest_s = max(self.seen.longest_s, time.monotonic() - began)
        if problem:
            log.info("%s: %s: %s", outcome, asked, problem[:1000])
        if outcome == "wrong":
            self.seen.wrong.append(f"{asked}: {problem}"[:1000])
        return reply

    async def keep_asking(self, port: int, over: asyncio.Event, going: asyncio.Event | None = None) -> None:
        """Until it is over; it rests while `going` is not set."""
        while not over.is_set():
            if going is not None:
                await going.wait()
            await self.ask(port)

    async def keep_asking_on_one(self, port: int, over: asyncio.Event) -> None:
        """As long as it can on one connection; on the next one when the gateway has said that it closes this one."""
        wire: Wire | None = None

        async def tell(data: bytes) -> tuple[Reply, Heard]:
            nonlocal wire
            if wire is None or wire.reader.at_eof():  # as connection pools look
                wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
            else:
                self.kept += 1
            await wire.send(data)
            return await listen(wire)

        while not over.is_set():
            reply = await self._ask(tell)
            if wire is not None and (reply is None or reply.headers.get("connection") == "close"):
                await wire.close()
                wire = None
        if wire is not None:
            await wire.close()
