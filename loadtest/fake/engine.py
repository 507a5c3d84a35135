"""An OpenAI-compatible engine without a model: on the wire like vLLM 0.32, as slow as a cost model says.

    python -m loadtest.fake.engine --port 9001 --model smollm2 --cost gpu-7b --policy vtc

or, inside a test, `async with FakeEngine(cost=PRESETS["instant"]) as engine: … engine.url`.
Answers are greedy, deterministic and can be continued anywhere (`hash_model`); failures come on demand (`faults`).
"""

import argparse
import asyncio
import hmac
import logging
import os
import ssl
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import orjson

from loadtest.fake import vllm_wire
from loadtest.fake.adapters import Adapters
from loadtest.fake.embedding import embeddings
from loadtest.fake.engine_metrics import exposition
from loadtest.fake.faults import HEALTHY, Faults, faults_from
from loadtest.fake.http_server import ServedExchange
from loadtest.fake.kept_kv import FETCH_PATH, KeptKv, fetch
from loadtest.fake.messages_wire import MessagesWire, anthropic_error, ask_messages
from loadtest.fake.responses_wire import ResponsesWire, ask_responses
from loadtest.fake.vllm_wire import Ask, Json, OpenAIWire, Said, Wire, WireRefusal, ask_chat, ask_completion
from loadtest.simulator.batch import ContinuousBatch, Iteration
from loadtest.simulator.costmodel import PRESETS, CostModel
from loadtest.simulator.kv_blocks import block_hashes
from loadtest.traces import hash_model
from scheduler.catalog import build, options_from
from scheduler.jobs import Job, Outcome, Tier
from scheduler.tiers import BY_NAME, TieredLanes

_JSON = "application/json"
_SSE = "text/event-stream; charset=utf-8"
# An iteration that ended late (timers tick in milliseconds) is made up for, a busy machine's delay is not.
_CATCH_UP_S = 0.005
_SEEN = 1000

log = logging.getLogger("loadtest.fake.engine")


def _wall_clock() -> float:
    return datetime.now(UTC).timestamp()


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What kind of engine it is.

    max_model_tokens: context length. mean_answer_tokens: mean length of an answer that ends by itself.
    plugin: it shows and obeys what our plug-in inside vLLM does (the policy's metric, orders to change it).
    kv_lease_s: it keeps a prompt's KV so long for another engine to fetch.
    sleep_mode: it can be put to sleep, as vLLM with `--enable-sleep-mode` and VLLM_SERVER_DEV_MODE=1.
    adapters: LoRA adapters that it keeps; 0: it runs without LoRA. adapter_load_s: for one to be loaded.
    key: asked for below /v1, as vLLM does with `--api-key`; empty for no key.
    """

    model: str = "fake"
    cost: CostModel = PRESETS["quick"]
    policy: str = "fcfs"
    policy_options: Mapping[str, str] = field(default_factory=dict)
    max_model_tokens: int = 8192
    mean_answer_tokens: int = 64
    plugin: bool = False
    kv_lease_s: float = 30.0
    sleep_mode: bool = False
    adapters: int = 0
    adapter_load_s: float = 0.0
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A generation request as the engine received it, for tests to look at."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class FakeChoice:
    """One choice of an answer while it is made. before, after: a plain chunk around the text of a token. unsent: how
    many of its ids have not been streamed."""

    answer: "FakeAnswer"
    index: int
    prompt: int
    job: Job
    next: hash_model.ModelContinuation
    max_tokens: int
    before: bytes = b""
    after: bytes = b""
    ids: list[int] = field(default_factory=list)
    unsent: int = 0
    finish: str = ""


@dataclass(slots=True, eq=False)
class FakeAnswer:
    """One request being answered. left: its client has gone before it was admitted."""

    exchange: ServedExchange
    wire: Wire
    choices: list[FakeChoice] = field(default_factory=list)
    started: bool = False
    left: bool = False

    @property
    def ask(self) -> Ask:
        return self.wire.ask

    def said(self) -> list[Said]:
        """Its choices, once all have finished."""
        return [Said(choice.prompt, choice.ids, _text(choice.ids), choice.finish) for choice in self.choices]


@dataclass(frozen=True, slots=True)
class Api:
    """One API: the prefix of its ids, how its requests are read, and its bytes."""

    prefix: str
    ask: Callable[[Json, int], Ask]
    wire: Callable[[str, int, str, Ask], Wire]


_APIS: Mapping[str, Api] = {
    "/v1/chat/completions": Api("chatcmpl-", ask_chat, OpenAIWire),
    "/v1/completions": Api("cmpl-", ask_completion, OpenAIWire),
    "/v1/responses": Api("resp_", ask_responses, ResponsesWire),
    "/v1/messages": Api("chatcmpl-", ask_messages, MessagesWire),
}


Routes = Mapping[str, Callable[[ServedExchange], None]]


class FakeEngine:
    """The engine: listens on 127.0.0.1 while it is entered. `faults` may be set at any time."""

    def __init__(
        self,
        setup: EngineSetup | None = None,
        *,
        port: int = 0,
        faults: Faults = HEALTHY,
        die: Callable[[], None] | None = None,
        wall_clock: Callable[[], float] = _wall_clock,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """tls: it speaks HTTPS, as vLLM does with `--ssl-certfile`."""
        self._tls = tls
        self.setup = setup or EngineSetup()
        self.faults = faults
        self.seen: deque[SeenRequest] = deque(maxlen=_SEEN)
        self.port = port
        self.batch = ContinuousBatch(self.setup.cost, TieredLanes(build(self.setup.policy, self.setup.policy_options)))
        self.kept = KeptKv(self.batch.keep, self.setup.kv_lease_s)
        self.fetched = self.not_fetched = 0
        self._fetches: set[asyncio.Task[None]] = set()
        self._wall_clock = wall_clock
        self._die = die
        self._connections: set[ServedExchange] = set()
        self._choices: dict[Job, FakeChoice] = {}
        self._server: asyncio.Server | None = None
        self._tick: asyncio.Handle | None = None
        self.stalled = False
        self.accepted = 0
        self.unauthorised = 0
        self.scraped = 0  # times that its metrics were asked for
        self.adapters = Adapters(self.setup)
        self.asleep = False
        self.naps = self.woken = 0
        self._posts, self._gets = self._post_routes(), self._get_routes()

    def _post_routes(self) -> Routes:
        return {
            **dict.fromkeys(_APIS, self._generate),
            "/v1/embeddings": self._embed,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/fake/faults": self._set_faults,
            FETCH_PATH: self._give_kv,
            "/v1/load_lora_adapter": self.adapters.load,
            "/v1/unload_lora_adapter": self.adapters.unload,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
        }

    def _get_routes(self) -> Routes:
        return {
            "/health": self._health,
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/version": self._version,
            "/load": self._load,
        }

    # life

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self.faults.start_delay_s:
            await asyncio.sleep(self.faults.start_delay_s)
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()
        if self._server is not None:
            await self._server.wait_closed()

    async def listen(self) -> None:
        """Accept connections, on the port of before if it had one: also how a dead engine comes back."""
        self._server = await self._loop.create_server(self._accept, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.stalled = False
        self._wake()

    def _accept(self) -> ServedExchange:
        self.accepted += 1
        return ServedExchange(self._serve, self._connections)

    def close_idle(self) -> None:
        """Close the connections on which nothing is being answered, as a server's keep-alive limit does."""
        for connection in list(self._connections):
            if not connection.busy:
                connection.cut()

    def refuse(self) -> None:
        """Refuse new connections; open ones go on. `listen` ends it."""
        if self._server is not None:
            self._server.close()

    def die(self) -> None:
        """As after SIGKILL: connections are reset, the batch is lost, new connections are refused."""
        self.refuse()
        self._stop_ticking()
        for connection in list(self._connections):
            connection.abort()
        for choice in list(self._choices.values()):
            self._end(choice, Outcome.FAILED)
        for fetch_ in list(self._fetches):
            fetch_.cancel()
        self.kept.drop_all()
        self.adapters.lose()

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return self.batch.running()

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self.batch.waiting()

    # requests

    def _serve(self, exchange: ServedExchange) -> None:
        table = self._posts if exchange.method == "POST" else self._gets
        route = table.get(exchange.path)
        if self.setup.key and exchange.path.startswith("/v1") and not self._is_authorised(exchange):
            self.unauthorised += 1
            exchange.respond(HTTPStatus.UNAUTHORIZED, b'{"error":"Unauthorized"}', _JSON)
            return
        try:
            if route is None:
                known = exchange.path in self._posts or exchange.path in self._gets
                status = HTTPStatus.METHOD_NOT_ALLOWED if known else HTTPStatus.NOT_FOUND
                raise WireRefusal(status, status.phrase, status.phrase)
            route(exchange)
        except WireRefusal as refused:
            anthropic = exchange.path == "/v1/messages"
            exchange.respond(refused.status, anthropic_error(refused.body) if anthropic else refused.body, _JSON)

    def _is_authorised(self, exchange: ServedExchange) -> bool:
        return hmac.compare_digest(
            exchange.headers.get("authorization", "").encode(), f"Bearer {self.setup.key}".encode()
        )

    def _sleep(self, exchange: ServedExchange) -> None:
        self._turn(exchange, asleep=True)

    def _wake_up(self, exchange: ServedExchange) -> None:
        self._turn(exchange, asleep=False)

    def _turn(self, exchange: ServedExchange, *, asleep: bool) -> None:
        if not self.setup.sleep_mode:
            raise WireRefusal(HTTPStatus.NOT_FOUND, "Not Found", "Not Found")
        self.naps += asleep and not self.asleep
        self.woken += self.asleep and not asleep
        self.asleep = asleep
        exchange.respond(200, orjson.dumps({"status": "sleeping" if asleep else "awake"}), _JSON)

    def _generate(self, exchange: ServedExchange) -> None:
        if self.asleep:  # vLLM would not answer until somebody wakes it
            raise WireRefusal(HTTPStatus.SERVICE_UNAVAILABLE, "asleep", "asleep")
        api = _APIS[exchange.path]
        body = vllm_wire.parse_body(exchange.body)
        self.seen.append(SeenRequest(exchange.path, dict(exchange.headers), body))
        if self.faults.error_status:
            status = self.faults.error_status
            self._strike()
            raise WireRefusal(status, "InternalServerError", "EngineCore encountered an issue.")
        self._check_model(body)
        ask = api.ask(body, self._context_tokens())
        request_id = api.prefix + (exchange.headers.get("x-request-id") or uuid.uuid4().hex)
        answer = FakeAnswer(
            exchange, api.wire(request_id, int(self._wall_clock()), body.get("model") or self.setup.model, ask)
        )
        if ask.cuts:
            exchange.begin_stream(_SSE)
            exchange.send(answer.wire.opening(1))
            exchange.cut(vllm_wire.event({"cut": "in the middle of a chunk"}))
        elif self.setup.plugin and "evenhand_policy" in ask.extra:
            exchange.respond(200, answer.wire.whole([], {"evenhand": self._switch(ask.extra)}), _JSON)
        elif ask.transfer and ask.transfer.get("do_remote_prefill"):
            answer.exchange.gone = lambda: setattr(answer, "left", True)
            task = self._loop.create_task(self._admit_with_kv(answer, ask.transfer))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)
        else:
            self._admit(answer)

    async def _admit_with_kv(self, answer: FakeAnswer, params: Mapping[str, Any]) -> None:
        """Fetches the KV first; what cannot be fetched is computed, as with `kv_load_failure_policy: recompute`."""
        there = not self.faults.no_transfer and await fetch(params)
        self.fetched += there
        self.not_fetched += not there
        if not answer.left:
            self._admit(answer, transferred=there)

    def _give_kv(self, exchange: ServedExchange) -> None:
        name = str(vllm_wire.parse_body(exchange.body).get("remote_request_id"))
        exchange.respond(200 if self.kept.release(name) else 404, b"", _JSON)

    def _switch(self, extra: Mapping[str, Any]) -> dict[str, str]:
        """Obeys an order to change the policy, as our plug-in does inside vLLM, or keeps the old one."""
        try:
            policy = build(str(extra["evenhand_policy"]), options_from(extra.get("evenhand_policy_options", ())))
        except ValueError as refusal:
            return {"error": str(refusal)}
        self.batch.switch(policy, self._loop.time())
        return {"policy": policy.name}

    def _check_model(self, body: Mapping[str, Any]) -> None:
        model = body.get("model")
        if model is not None and model != self.setup.model and model not in self.adapters.loaded:
            raise WireRefusal(404, "NotFoundError", f"The model `{model}` does not exist.", "model")

    def _context_tokens(self) -> int:
        return min(self.setup.max_model_tokens, self.setup.cost.kv_capacity_tokens)

    def _admit(self, answer: FakeAnswer, *, transferred: bool = False) -> None:
        now = self._loop.time()
        ask = answer.ask
        for at, prompt in enumerate(ask.prompts):
            blocks = block_hashes(prompt, self.setup.cost.prefix_block_tokens)
            for sample in range(ask.n):
                choice = self._choice(answer, at, sample, now)
                answer.choices.append(choice)
                self._choices[choice.job] = choice
                self.batch.add(choice.job, now, transferred=transferred, blocks=blocks)
        answer.exchange.gone = lambda: self._abort(answer)
        self._wake()

    def _choice(self, answer: FakeAnswer, at: int, sample: int, now: float) -> FakeChoice:
        ask = answer.ask
        prompt = ask.prompts[at]
        index = at * ask.n + sample
        room_tokens = self._context_tokens() - len(prompt)
        max_tokens = room_tokens if ask.max_tokens is None else ask.max_tokens
        job = Job(
            id=f"{answer.wire.request_id}-{index}-{uuid.uuid4().hex[:8]}",
            tenant=ask.tenant,
            prompt_tokens=len(prompt),
            arrived_at=now,
            max_tokens=max_tokens,
            weight=ask.number("evenhand_weight") or 1.0,
            tier=BY_NAME.get(str(ask.extra.get("evenhand_tier")), Tier.DEFAULT),
        )
        self._learn_service(ask, job, now)
        salt = sample + (0x5EED if self.faults.wrong_answers else 0)
        said = hash_model.continuation(prompt, mean_tokens=self.setup.mean_answer_tokens, salt=salt)
        choice = FakeChoice(answer, index, at, job, said, max_tokens)
        if ask.stream:
            choice.before, choice.after = answer.wire.plain(index)
        return choice

    def _learn_service(self, ask: Ask, job: Job, now: float) -> None:
        service = ask.number("evenhand_service")
        if service is not None:
            self.batch.lanes.told(job, service, now)

    def _abort(self, answer: FakeAnswer) -> None:
        for choice in answer.choices:
            if not choice.finish:
                self._end(choice, Outcome.ABORTED)

    # iterations

    def _wake(self) -> None:
        if self._tick is None and not self.stalled:
            # Not at once: all that arrives in this turn of the loop starts together.
            self._tick = self._loop.call_soon(self._begin, self._loop.time())

    def _stop_ticking(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None

    def _begin(self, now: float) -> None:
        iteration = self.batch.schedule(now)
        if iteration is None:
            self._tick = None
            return
        end = now + iteration.duration_s
        if end <= self._loop.time():
            self._tick = self._loop.call_soon(self._finish, iteration, end)
        else:
            self._tick = self._loop.call_at(end, self._finish, iteration, end)

    def _finish(self, iteration: Iteration, end: float) -> None:
        for job in self.batch.complete(iteration, end):
            choice = self._choices.get(job)
            if choice is not None:  # else a fault took it in this very iteration
                self._emit(choice, end)
        if self.stalled or self._tick is None:
            self._tick = None
            return
        now = self._loop.time()
        self._begin(end if now - end < _CATCH_UP_S else now)

    def _emit(self, choice: FakeChoice, now: float) -> None:
        """One token of one choice is there: on the wire with it, and out of the batch if it was the last."""
        if self.faults.in_stream and self._struck(choice):
            return
        ask = choice.answer.ask
        made = len(choice.ids) + 1
        token = choice.next.next(may_end=not ask.ignore_eos and made > ask.min_tokens)
        choice.ids.append(token)
        if token == hash_model.TURN_END and not ask.ignore_eos:
            choice.finish = "stop"
        elif made >= choice.max_tokens:
            choice.finish = "length"
        if ask.stream:
            self._stream(choice, token)
        if choice.finish:
            self._end(choice, Outcome.DONE if choice.finish == "stop" else Outcome.LENGTH)
            self._close(choice.answer)

    def _stream(self, choice: FakeChoice, token: int) -> None:
        answer = choice.answer
        if not answer.started:
            self._start_stream(answer)
        ask = answer.ask
        choice.unsent += 1
        if 1 < len(choice.ids) and choice.unsent < ask.stream_interval and not choice.finish:
            return
        with_prompt = len(choice.ids) == 1 and (ask.echo or (ask.return_token_ids and not ask.chat))
        if choice.before and ask.stream_interval == 1 and not choice.finish and not with_prompt:
            text = b"" if token < 3 else hash_model.token_bytes(token)
            after = choice.after % token if ask.return_token_ids else choice.after
            answer.exchange.send(choice.before + text + after)
        elif chunk := self._rich_chunk(choice):
            answer.exchange.send(chunk)
        choice.unsent = 0

    def _start_stream(self, answer: FakeAnswer) -> None:
        answer.started = True
        answer.exchange.begin_stream(_SSE)
        opening = answer.wire.opening(len(answer.choices))
        if opening:
            answer.exchange.send(opening)

    def _rich_chunk(self, choice: FakeChoice) -> bytes:
        """The tokens that have not been streamed yet, of which the last has just been made."""
        ask, first = choice.answer.ask, len(choice.ids) == 1
        ids = choice.ids[-choice.unsent :]
        text = _text(ids)
        if ask.echo and first:
            text = (ask.prompt_text or hash_model.decode(ask.prompts[choice.prompt])) + text
        more: dict[str, Any] = {}
        if ask.return_token_ids:
            more["token_ids"] = ids
            if first:
                more["prompt_token_ids"] = ask.prompts[choice.prompt]
        if ask.logprobs:
            more["logprobs"] = (vllm_wire.chat_logprobs if ask.chat else vllm_wire.text_logprobs)(ids)
        return choice.answer.wire.token(choice.index, text, choice.finish or None, more, len(choice.ids))

    def _close(self, answer: FakeAnswer) -> None:
        """Send what ends the answer, once its last choice has finished."""
        if any(not choice.finish for choice in answer.choices):
            return
        exchange, ask = answer.exchange, answer.ask
        exchange.gone = None
        if ask.stream:
            exchange.send(answer.wire.closing(answer.said()))
            exchange.end_stream()
            return
        exchange.respond(200, answer.wire.whole(answer.said(), self._handoff(ask)), _JSON)

    def _handoff(self, ask: Ask) -> dict[str, Any] | None:
        """What a decode worker needs to fetch the KV of this prompt, where the client asked to keep it."""
        if not ask.transfer or not ask.transfer.get("do_remote_decode"):
            return None
        return self.kept.keep(ask.prompt_tokens, self.port)

    def _end(self, choice: FakeChoice, outcome: Outcome) -> None:
        choice.finish = choice.finish or "abort"
        if self._choices.pop(choice.job, None) is not None:
            self.batch.finish(choice.job, outcome, self._loop.time())

    # faults

    def _struck(self, choice: FakeChoice) -> bool:
        """Whether a fault strikes instead of the next token."""
        made, faults = len(choice.ids), self.faults
        if made == faults.die_after_tokens:
            self._strike()
            (self._die or self.die)()
        elif made == faults.stall_after_tokens:
            self.stalled = True
        elif made == faults.cut_after_tokens:
            self._strike()
            choice.answer.exchange.cut(vllm_wire.event({"cut": "in the middle of a chunk"}))
        elif made == faults.error_event_after_tokens:
            self._strike()
            self._break(choice.answer)
        else:
            return self.stalled
        return True

    def _strike(self) -> None:
        if self.faults.times:
            left = self.faults.times - 1
            self.faults = replace(self.faults, times=left) if left else HEALTHY

    def _break(self, answer: FakeAnswer) -> None:
        """An error event, and the end of the stream."""
        self._abort(answer)
        answer.exchange.gone = None
        error = vllm_wire.error_body(500, "InternalServerError", "EngineCore encountered an issue.")
        if not answer.ask.stream:
            answer.exchange.respond(500, error, _JSON)
            return
        if not answer.started:
            self._start_stream(answer)
        answer.exchange.send(answer.wire.failed(error))
        answer.exchange.end_stream()

    def heal(self) -> None:
        """All faults over; what stalled goes on."""
        self.faults = HEALTHY
        self.stalled = False
        self._wake()

    def _set_faults(self, exchange: ServedExchange) -> None:
        try:
            faults = faults_from(vllm_wire.parse_body(exchange.body))
        except (TypeError, ValueError) as error:
            raise WireRefusal(400, "BadRequestError", str(error)) from error
        self.heal()
        self.faults = faults
        exchange.respond(200, b"{}", _JSON)

    # the small endpoints

    def _health(self, exchange: ServedExchange) -> None:
        exchange.respond(503 if self.faults.unhealthy else 200, b"", _JSON)

    def _models(self, exchange: ServedExchange) -> None:
        card = {
            "id": self.setup.model,
            "object": "model",
            "created": int(self._wall_clock()),
            "owned_by": "vllm",
            "root": self.setup.model,
            "parent": None,
            "max_model_len": self._context_tokens(),
            "permission": [],
        }
        cards = [card, *self.adapters.cards(card)]
        exchange.respond(200, orjson.dumps({"object": "list", "data": cards}), _JSON)

    def _metrics(self, exchange: ServedExchange) -> None:
        self.scraped += 1
        body = exposition(self.batch, self.setup.model, plugin=self.setup.plugin)
        if self.setup.plugin:
            body += b"evenhand_engine_adapters %d\n" % self.setup.adapters
        if self.setup.sleep_mode:
            body += b'vllm:engine_sleep_state{sleep_state="awake"} %d\n' % (not self.asleep)
        exchange.respond(200, body, "text/plain; version=1.0.0; charset=utf-8")

    def _version(self, exchange: ServedExchange) -> None:
        exchange.respond(200, b'{"version":"0.32.0"}', _JSON)

    def _load(self, exchange: ServedExchange) -> None:
        exchange.respond(200, orjson.dumps({"server_load": self.running + self.waiting}), _JSON)

    def _embed(self, exchange: ServedExchange) -> None:
        body = vllm_wire.parse_body(exchange.body)
        self.seen.append(SeenRequest(exchange.path, dict(exchange.headers), body))
        self._check_model(body)
        ask = ask_completion({"prompt": body.get("input"), "max_tokens": 1}, self._context_tokens())
        exchange.respond(200, embeddings(body, ask, self.setup.model, int(self._wall_clock())), _JSON)

    def _tokenize(self, exchange: ServedExchange) -> None:
        body = vllm_wire.parse_body(exchange.body)
        self._check_model(body)
        if "messages" in body:
            ids = ask_chat({"messages": body["messages"]}, self._context_tokens()).prompts[0]
        else:
            ids = hash_model.encode(str(body.get("prompt", "")))
        strings = [hash_model.decode([token]) for token in ids] if body.get("return_token_strs") else None
        answer = {"count": len(ids), "max_model_len": self._context_tokens(), "tokens": ids, "token_strs": strings}
        exchange.respond(200, orjson.dumps(answer), _JSON)

    def _detokenize(self, exchange: ServedExchange) -> None:
        ids = vllm_wire.parse_body(exchange.body).get("tokens") or []
        exchange.respond(200, orjson.dumps({"prompt": hash_model.decode(ids)}), _JSON)


def _text(ids: Sequence[int]) -> str:
    """What the client reads: special tokens have no text."""
    return hash_model.decode(token for token in ids if token > hash_model.TURN_END)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (0: any free one, printed at the start)")
    parser.add_argument("--model", default="fake", help="the model name it answers to (default: fake)")
    parser.add_argument(
        "--cost",
        choices=sorted(PRESETS),
        default="quick",
        help="how slow it is: a preset of the cost model (default: quick)",
    )
    parser.add_argument("--ssl-certfile", help="PEM file with certificate and key: it speaks HTTPS")
    parser.add_argument("--max-seqs", type=int, help="batch slots, in place of the preset's")
    parser.add_argument("--kv-tokens", type=int, help="KV capacity in tokens, in place of the preset's")
    parser.add_argument("--max-model-len", type=int, default=8192, help="context length in tokens (default: 8192)")
    parser.add_argument("--mean-answer-tokens", type=int, default=64, help="mean length of an answer (default: 64)")
    parser.add_argument("--policy", default="fcfs", help="scheduling policy inside the engine (default: fcfs)")
    parser.add_argument("--policy-option", action="append", default=[], metavar="K=V", help="an option of the policy")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="K=V",
        help="a fault from the start: see loadtest/fake/faults.py",
    )


def _pairs(options: Sequence[str]) -> dict[str, str]:
    pairs = dict(option.partition("=")[::2] for option in options)
    if any(not value for value in pairs.values()):
        raise ValueError("Options are given as NAME=VALUE.")
    return pairs


def _setup(args: argparse.Namespace) -> EngineSetup:
    cost = PRESETS[args.cost]
    cost = replace(
        cost,
        max_seqs=args.max_seqs or cost.max_seqs,
        kv_capacity_tokens=args.kv_tokens or cost.kv_capacity_tokens,
    )
    options = _pairs(args.policy_option)
    return EngineSetup(
        args.model,
        cost,
        args.policy,
        options,
        args.max_model_len,
        args.mean_answer_tokens,
        key=os.environ.get("VLLM_API_KEY", ""),
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    import uvloop

    async def serve() -> None:
        faults = faults_from({name: orjson.loads(value) for name, value in _pairs(args.fault).items()})
        tls = None if args.ssl_certfile is None else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if tls is not None:
            tls.load_cert_chain(args.ssl_certfile)
        die: Callable[[], None] = lambda: os._exit(1)  # noqa: E731
        async with FakeEngine(_setup(args), port=args.port, faults=faults, die=die, tls=tls) as engine:
            log.info("Fake engine for model %s listens on %s", engine.setup.model, engine.url)
            await asyncio.Event().wait()

    try:
        uvloop.run(serve())
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        log.error("%s", error)
        return 2
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.fake.engine", description=__doc__)
    add_arguments(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
