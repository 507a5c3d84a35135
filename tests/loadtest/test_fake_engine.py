import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import orjson
import pytest

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import Faults
from loadtest.simulator.costmodel import PRESETS, CostModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a river."}]
SLOW = EngineSetup(cost=CostModel(iteration_s=0.005, max_seqs=4))


async def until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    """Poll until a condition holds; a failure names no more than the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the engine sets no event for us
            await asyncio.sleep(0.002)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine:
        yield engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(engine) as client:
        yield client


def client_of(engine: FakeEngine) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=engine.url, timeout=60)


async def stream(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """All events of a stream: parsed, and "[DONE]" as it stands."""
    async with client.stream("POST", path, json=body | {"stream": True}) as answer:
        text = (await answer.aread()).decode()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [event if event == "[DONE]" else orjson.loads(event) for event in events]


async def chat(client: httpx2.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json={"messages": STORY} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_it_knows_the_capital_of_france(client: httpx2.AsyncClient) -> None:
    answer = await chat(client, messages=QUESTION, temperature=0)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8


async def test_a_stream_says_the_same_in_pieces_and_ends_as_vllm_does(client: httpx2.AsyncClient) -> None:
    whole = await chat(client)
    first, *middle, last, end = await stream(client, "/v1/chat/completions", {"messages": STORY})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"]["content"] for event in [*middle, last]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert end == "[DONE]"


async def test_usage_comes_last_when_asked_for_and_in_every_chunk_when_asked_for_that(
    client: httpx2.AsyncClient,
) -> None:
    options = {"include_usage": True}
    *_, last, _done = await stream(client, "/v1/chat/completions", {"messages": STORY, "stream_options": options})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _done = await stream(client, "/v1/chat/completions", {"messages": STORY, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [*range(len(events) - 1), len(events) - 2]


@pytest.mark.parametrize("cut", [1, 7, 23])
async def test_an_answer_can_be_continued_by_token_ids_and_by_text(client: httpx2.AsyncClient, cut: int) -> None:
    ask = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    whole = await chat(client, **ask)
    ids = whole["choices"][0]["token_ids"]
    body = {"prompt": whole["prompt_token_ids"] + ids[:cut], "max_tokens": 40 - cut} | {**ask, "max_tokens": 40 - cut}
    rest = (await client.post("/v1/completions", json=body)).json()
    assert rest["choices"][0]["token_ids"] == ids[cut:]
    head = (await client.post("/detokenize", json={"tokens": ids[:cut]})).json()["prompt"]
    messages = [*STORY, {"role": "assistant", "content": head}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 40 - cut}
    again = await chat(client, **{**ask, **extra, "messages": messages})
    assert head + again["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]


async def test_max_tokens_with_ignore_eos_gives_exactly_that_many(client: httpx2.AsyncClient) -> None:
    answer = await chat(client, max_tokens=300, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 300
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_n_choices_differ_and_each_ends_once_in_a_stream(client: httpx2.AsyncClient) -> None:
    *events, _done = await stream(client, "/v1/completions", {"prompt": "Once", "n": 3, "max_tokens": 5})
    ends = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    answer = (await client.post("/v1/completions", json={"prompt": "Once", "n": 3, "max_tokens": 5})).json()
    assert len({choice["text"] for choice in answer["choices"]}) == 3


async def test_several_prompts_give_several_choices(client: httpx2.AsyncClient) -> None:
    answer = (await client.post("/v1/completions", json={"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 2})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 5


async def test_token_ids_come_with_every_chunk_and_the_prompts_with_the_first(client: httpx2.AsyncClient) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "return_token_ids": True}
    first, second, *_ = await stream(client, "/v1/completions", body)
    assert first["choices"][0]["prompt_token_ids"] == [5, 6, 7]
    assert second["choices"][0]["prompt_token_ids"] is None
    assert len(second["choices"][0]["token_ids"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/chat/completions", {"messages": STORY, "model": "other"}, 404, "NotFoundError"),
        ("/v1/chat/completions", {"model": "fake"}, 400, "Bad Request"),
        ("/v1/chat/completions", {"messages": []}, 400, "Bad Request"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 9000}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": [5] * 9000}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, 400, "Bad Request"),
        ("/v1/completions", {"prompt": [99_999_999]}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": ""}, 400, "BadRequestError"),
        ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": 3}, 400, "Bad Request"),
        ("/v1/completions", {"prompt": "a", "vllm_xargs": {"evenhand_weight": "much"}}, 400, "Bad Request"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "Bad Request"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
async def test_what_vllm_refuses_is_refused_in_its_words(
    client: httpx2.AsyncClient, path: str, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, status)


async def test_it_listens_only_after_its_slow_start() -> None:
    engine = FakeEngine(faults=Faults(start_delay_s=0.2))
    starting = asyncio.create_task(engine.__aenter__())
    await asyncio.sleep(0)
    assert engine.port == 0
    await starting
    async with client_of(engine) as client:
        assert (await client.get("/health")).status_code == 200
    await engine.__aexit__(None, None, None)


async def test_a_body_that_is_no_json_is_a_400(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400


async def test_metrics_tell_what_was_done_under_vllms_names(client: httpx2.AsyncClient) -> None:
    await chat(client, max_tokens=5, ignore_eos=True)
    page = (await client.get("/metrics")).text
    assert 'vllm:generation_tokens_total{engine="0",model_name="fake"} 5.0' in page
    assert 'vllm:num_requests_running{engine="0",model_name="fake"} 0.0' in page


async def test_tokenize_counts_as_the_engine_counts(client: httpx2.AsyncClient) -> None:
    counted = (await client.post("/tokenize", json={"messages": STORY})).json()["count"]
    assert (await chat(client, max_tokens=1))["usage"]["prompt_tokens"] == counted


async def test_many_requests_share_one_connection(engine: FakeEngine) -> None:
    limits = httpx2.Limits(max_connections=1)
    async with httpx2.AsyncClient(base_url=engine.url, limits=limits, timeout=60) as client:
        for _ in range(5):
            await chat(client, max_tokens=2)


async def test_a_client_that_leaves_frees_its_slot_and_its_memory() -> None:
    async with FakeEngine(SLOW) as engine, client_of(engine) as client:
        body = {"messages": STORY, "stream": True, "ignore_eos": True, "max_tokens": 5000}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_raw())
            assert engine.running == 1
        await until(lambda: engine.running == 0)
        assert engine.batch.kv_used_tokens == 0
        assert engine.batch.counts.finished == {"aborted": 1}


async def test_requests_over_the_slots_wait() -> None:
    async with FakeEngine(SLOW, faults=Faults(stall_after_tokens=0)) as engine, client_of(engine) as client:
        asks = [asyncio.create_task(chat(client, max_tokens=20, ignore_eos=True)) for _ in range(6)]
        await until(lambda: (engine.running, engine.waiting) == (4, 2))
        engine.heal()
        await asyncio.gather(*asks)
        assert (engine.running, engine.waiting) == (0, 0)


async def test_the_tenant_travels_in_vllm_xargs_to_the_policy() -> None:
    setup = EngineSetup(cost=PRESETS["instant"], policy="vtc")
    async with FakeEngine(setup) as engine, client_of(engine) as client:
        await chat(client, max_tokens=10, ignore_eos=True, vllm_xargs={"evenhand_tenant": "a"})
        assert engine.batch.lanes.service("a") >= 20
        assert engine.seen[-1].body["vllm_xargs"] == {"evenhand_tenant": "a"}


async def test_a_prefill_leg_hands_over_what_the_decode_leg_needs(client: httpx2.AsyncClient) -> None:
    ask = {"prompt": [5] * 300, "max_tokens": 1}
    transfer = {"do_remote_decode": True, "do_remote_prefill": False}
    first = (await client.post("/v1/completions", json=ask | {"kv_transfer_params": transfer})).json()
    handed = first["kv_transfer_params"]
    assert handed["do_remote_prefill"] is True
    second = await client.post("/v1/completions", json=ask | {"kv_transfer_params": handed})
    assert second.json()["choices"][0]["text"] == first["choices"][0]["text"]


# Failures


async def read_until_it_breaks(client: httpx2.AsyncClient, **more: Any) -> bytes:
    body = {"messages": STORY, "stream": True, "ignore_eos": True, "max_tokens": 50} | more
    received = b""
    with pytest.raises(httpx2.TransportError):
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for part in answer.aiter_raw():
                received += part
    return received


async def test_it_dies_after_so_many_tokens_and_comes_back_on_the_same_port() -> None:
    async with FakeEngine(SLOW, faults=Faults(die_after_tokens=5, times=1)) as engine, client_of(engine) as client:
        received = await read_until_it_breaks(client)
        assert received.count(b"data: ") == 6  # the role, and five tokens
        with pytest.raises(httpx2.ConnectError):
            await client.get("/health")
        assert engine.running == 0
        await engine.listen()
        assert (await client.get("/health")).status_code == 200
        await chat(client, max_tokens=10, ignore_eos=True)


async def test_it_closes_in_the_middle_of_a_chunk() -> None:
    async with FakeEngine(SLOW, faults=Faults(cut_after_tokens=3, times=1)) as engine, client_of(engine) as client:
        received = await read_until_it_breaks(client)
        assert not received.endswith(b"\n\n")
        await until(lambda: engine.running == 0)
        await chat(client, max_tokens=10, ignore_eos=True)


async def test_it_stalls_with_open_connections_and_good_health_until_healed() -> None:
    async with FakeEngine(SLOW, faults=Faults(stall_after_tokens=3)) as engine, client_of(engine) as client:
        ask = asyncio.create_task(chat(client, max_tokens=10, ignore_eos=True))
        await until(lambda: engine.stalled)
        assert (await client.get("/health")).status_code == 200
        assert not ask.done()
        engine.heal()
        assert (await ask)["usage"]["completion_tokens"] == 10


async def test_a_failure_inside_the_engine_is_an_error_event_and_the_end() -> None:
    async with FakeEngine(SLOW, faults=Faults(error_event_after_tokens=2)) as engine, client_of(engine) as client:
        *_, error, end = await stream(client, "/v1/chat/completions", {"messages": STORY})
        assert error["error"]["code"] == 500
        assert end == "[DONE]"
        assert engine.running == 0


async def test_it_answers_an_error_status_as_often_as_told(engine: FakeEngine, client: httpx2.AsyncClient) -> None:
    engine.faults = Faults(error_status=500, times=2)
    body = {"messages": STORY, "max_tokens": 1}
    statuses = [(await client.post("/v1/chat/completions", json=body)).status_code for _ in range(3)]
    assert statuses == [500, 500, 200]


async def test_wrong_answers_are_wrong_and_well_formed(engine: FakeEngine, client: httpx2.AsyncClient) -> None:
    engine.faults = Faults(wrong_answers=True)
    said = (await chat(client, messages=QUESTION))["choices"][0]["message"]["content"]
    assert said
    assert "Paris" not in said


async def test_faults_can_be_set_from_outside_and_unknown_ones_are_named(client: httpx2.AsyncClient) -> None:
    assert (await client.post("/fake/faults", json={"unhealthy": True})).status_code == 200
    assert (await client.get("/health")).status_code == 503
    refused = await client.post("/fake/faults", json={"explode": 1})
    assert refused.status_code == 400
    assert "explode" in refused.json()["error"]["message"]


async def test_it_refuses_connections_and_listens_again(engine: FakeEngine) -> None:
    engine.refuse()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", engine.port)) != 0
    await engine.listen()
    async with client_of(engine) as client:
        assert (await client.get("/health")).status_code == 200
