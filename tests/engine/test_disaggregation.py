"""Two real engines, one that reads prompts and one that answers: the answers are those of one engine, whatever dies.

EVENHAND_SOAK makes it two of each, more requests and more deaths; `make soak` sets it. EVENHAND_DEATHS: of each kind.
"""

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl", reason="NIXL is not installed")

from loadtest.bench.iterations.in_process_engine import chaotic_model
from tests.engine.halves import (
    CHAT,
    CONTEXT_TOKENS,
    TEXT,
    Half,
    Halves,
    choices,
    rests,
    serving,
    text_of,
    token_ids,
    until,
)

SOAK = os.environ.get("EVENHAND_SOAK", "1") != "1"
EACH = 2 if SOAK else 1  # engines on a side
RUNS = range(int(os.environ.get("EVENHAND_DEATHS", 20 if SOAK else 1)))  # of each death
REQUESTS = 2000 if SOAK else 80
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(0 if SOAK else 600)]

TOKENS = 8
# Around vLLM's blocks of 32 tokens, its chunks of 256, and up to the context limit.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 700, CONTEXT_TOKENS - TOKENS)
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
STORY = {"messages": [{"role": "user", "content": "Tell me a story of a fox, a crow and a piece of cheese."}]}

READ = {
    "max_tokens": 1,
    "kv_transfer_params": {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    },
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halves]:
    """Prefill and decode engines behind a gateway, as `evenhand serve` starts them."""
    model = chaotic_model(tmp_path_factory.mktemp("chaotic"))
    with serving(model, tmp_path_factory.mktemp("serve"), prefill=EACH, decode=EACH) as running:
        yield running


async def apart(halves: Halves, path: str, body: dict[str, Any]) -> Any:
    """The gateway's answer, which an engine of each kind must have had a part in."""
    before = await halves.metric("evenhand_prefills_total", outcome="read")
    fetched = await halves.metric_of(halves.decodes, "vllm:nixl_bytes_transferred_sum")
    answer = await halves.ask(path, body)
    assert await halves.metric("evenhand_prefills_total", outcome="read") == before + 1

    async def has_fetched() -> bool:
        return await halves.metric_of(halves.decodes, "vllm:nixl_bytes_transferred_sum") > fetched

    await until(has_fetched, 60.0, "the decode engine says that it fetched KV")
    return answer


@pytest.mark.parametrize("length", LENGTHS)
async def test_the_answer_is_that_of_one_engine_token_for_token(halves: Halves, length: int) -> None:
    body = {**GREEDY, "prompt": token_ids(length, seed=length), "return_token_ids": True}
    answer = await apart(halves, TEXT, body)
    expected = await halves.one_engine(TEXT, body)
    assert len(answer["choices"][0]["token_ids"]) == TOKENS
    assert choices(answer) == choices(expected)
    assert answer["usage"]["prompt_tokens"] == length and answer["usage"]["completion_tokens"] == TOKENS


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["e"], "max_tokens": 60},
        {"response_format": {"type": "json_object"}, "max_tokens": 40},
        {"structured_outputs": {"choice": ["cheese", "crow", "fox"]}},
        {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{4}"}, "max_tokens": 20},
        {"min_tokens": 5, "stop_token_ids": list(range(20_000)), "max_tokens": 30, "ignore_eos": False},
        {"seed": 7, "temperature": 1.0},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 30},
        {"n": 2, "seed": 3, "temperature": 1.0},
    ],
    ids=["stop", "json", "choice", "regex", "stop tokens", "seed", "penalties", "n"],
)
async def test_what_shapes_an_answer_shapes_it_alike(halves: Halves, fields: dict[str, Any]) -> None:
    body = {**GREEDY, **STORY, "return_token_ids": True, **fields}
    body["messages"] = [{"role": "user", "content": f"{sorted(fields)} {STORY['messages'][0]['content']}"}]
    answer = await (halves.ask(CHAT, body) if "n" in fields else apart(halves, CHAT, body))
    expected = await halves.one_engine(CHAT, body)
    assert choices(answer) == choices(expected)
    assert len(answer["choices"]) == fields.get("n", 1)


async def test_log_probabilities_are_those_of_one_engine(halves: Halves) -> None:
    body = {**GREEDY, "prompt": token_ids(70, seed=1), "logprobs": 3}
    told = (await apart(halves, TEXT, body))["choices"][0]["logprobs"]
    expected = (await halves.one_engine(TEXT, body))["choices"][0]["logprobs"]
    assert told["tokens"] == expected["tokens"]
    assert told["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-3)
    assert [list(top) for top in told["top_logprobs"]] == [list(top) for top in expected["top_logprobs"]]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_says_the_same(halves: Halves, path: str) -> None:
    asked = STORY if path == CHAT else {"prompt": token_ids(90, seed=2)}
    body = {**GREEDY, **asked, "max_tokens": 40, "stream_options": {"include_usage": True}}
    events = await halves.stream(path, body)
    expected = await halves.one_engine(path, {name: body[name] for name in body if name != "stream_options"})
    choice = expected["choices"][0]
    assert text_of(events) == (choice["message"]["content"] if path == CHAT else choice["text"])
    assert events[-1]["usage"]["completion_tokens"] == 40


async def test_many_at_once_get_each_its_own_answer(halves: Halves) -> None:
    bodies = [{**GREEDY, "prompt": token_ids(5 + 17 * number, seed=100 + number)} for number in range(24)]
    before = await halves.metric("evenhand_placements_total", placement="apart")
    answers = await asyncio.gather(*(halves.ask(TEXT, body) for body in bodies))
    assert await halves.metric("evenhand_placements_total", placement="apart") == before + 24
    for body, answer in zip(bodies, answers, strict=True):
        assert choices(answer) == choices(await halves.one_engine(TEXT, body))
    await halves.nothing_held()


async def test_each_engine_charges_the_tenant_for_what_it_does(halves: Halves) -> None:
    """The prompt where it is read, the answer where it is written (VTC's weights: 1 and 2)."""
    name, tenant = "evenhand_engine_tenant_service_total", {"tenant": "open"}
    await halves.nothing_held()
    await settled(halves)
    before = [await halves.metric_of(side, name, **tenant) for side in (halves.prefills, halves.decodes)]
    await apart(halves, TEXT, {**GREEDY, "prompt": token_ids(300, seed=3), "max_tokens": 40})
    await settled(halves)
    after = [await halves.metric_of(side, name, **tenant) for side in (halves.prefills, halves.decodes)]
    read, written = after[0] - before[0], after[1] - before[1]
    assert 300 <= read <= 302, "the prompt, and the first token of the answer"
    assert 2 * 39 <= written <= 2 * 39 + 1, "the rest of the answer, and of the prompt at most its last token"


async def settled(halves: Halves) -> None:
    """Has each engine tell what it has charged: its metrics follow work, at most once a second."""
    await asyncio.sleep(1.1)
    for half in (*halves.prefills, *halves.decodes):
        await halves.one_engine(TEXT, {**GREEDY, "prompt": [7], "max_tokens": 1}, half)


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(halves: Halves) -> None:
    async def leave(number: int) -> None:
        body = {**GREEDY, "prompt": token_ids(600, seed=200 + number), "max_tokens": 400}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02 + 0.05 * number):  # while it waits, is read, is fetched, is answered
                await halves.stream(TEXT, body)

    await asyncio.gather(*(leave(number) for number in range(24)))
    await halves.nothing_held()


async def test_kv_that_nobody_fetches_is_released(halves: Halves) -> None:
    """Until then it costs the engine that holds it little: vLLM's own look for whoever fetches it takes a core."""
    prefill = halves.prefills[0]
    told = await halves.ask(TEXT, {**GREEDY, **READ, "prompt": token_ids(500, seed=4)}, at=prefill.url)
    assert told["kv_transfer_params"]["do_remote_prefill"] is True
    assert await halves.metric("vllm:kv_cache_usage_perc", at=prefill.url) > 0
    await rests(prefill)  # long before the lease ends, unless the machine is very busy
    await halves.nothing_held()


async def test_idle_engines_leave_the_processor_alone(halves: Halves) -> None:
    """NIXL's own thread would take a core of each for itself."""
    await halves.nothing_held()
    for half in (*halves.prefills, *halves.decodes):
        await rests(half)


async def test_a_soak_with_clients_that_leave_ends_with_nothing_held(halves: Halves) -> None:
    """In the long run an engine of each kind dies, too. Whoever stays gets the one right answer."""
    moments = random.Random(11)
    prompts = [token_ids(moments.randint(1, 200), seed=10_000 + number) for number in range(REQUESTS)]
    said: dict[int, str] = {}

    async def client(number: int) -> None:
        body = {**GREEDY, "prompt": prompts[number], "max_tokens": 1 + number % 12}
        if number % 10 == 0:
            try:
                async with asyncio.timeout(moments.uniform(0.0, 0.5)):  # somewhere between its first and last step
                    await halves.stream(TEXT, body)
            except TimeoutError:
                pass  # it has left
            return
        said[number] = (await halves.ask(TEXT, body))["choices"][0]["text"]

    async def crash(start: int) -> None:
        await asyncio.sleep(0.3)  # somewhere in what is going on
        (halves.prefills if start < REQUESTS // 2 else halves.decodes)[0].kill()

    for start in range(0, REQUESTS, 20):
        clients = [client(number) for number in range(start, min(start + 20, REQUESTS))]
        deaths = [crash(start)] if SOAK and start in (500, 1500) else []
        await asyncio.gather(*clients, *deaths)
    assert len(said) == REQUESTS - REQUESTS // 10
    await halves.all_ready()
    await halves.nothing_held()
    for number in moments.sample(sorted(said), 40):
        body = {**GREEDY, "prompt": prompts[number], "max_tokens": 1 + number % 12}
        assert said[number] == (await halves.one_engine(TEXT, body))["choices"][0]["text"]


# The deaths come last: what dies is started again, and that takes its time.


async def crowd_while(halves: Halves, kill: Callable[[], None], survivor: Half, run: int) -> None:
    """Sixteen streams and answers, with `kill` in their midst; every one must be that of one engine."""
    prompts = [token_ids(40 * number, seed=1000 * run + number) for number in range(1, 17)]
    bodies = [{**GREEDY, "prompt": prompt, "max_tokens": 30} for prompt in prompts]

    async def text(number: int, body: dict[str, Any]) -> str:
        if number % 2:
            return text_of(await halves.stream(TEXT, body))
        said: str = (await halves.ask(TEXT, body))["choices"][0]["text"]
        return said

    asked = [asyncio.create_task(text(number, body)) for number, body in enumerate(bodies)]
    await asyncio.sleep(0.5)  # some are being read, some answered, some wait
    kill()
    for body, said in zip(bodies, await asyncio.gather(*asked), strict=True):
        assert said == (await halves.one_engine(TEXT, body, survivor))["choices"][0]["text"]


@pytest.mark.parametrize("run", RUNS)
async def test_the_death_of_a_prefill_engine_costs_no_answer(halves: Halves, run: int) -> None:
    await halves.all_ready()
    dying, survivor = halves.prefills[0], halves.decodes[0]
    late = {**GREEDY, "prompt": token_ids(90, seed=50_000 + run)}
    told = await halves.ask(TEXT, {**late, **READ}, at=dying.url)
    await crowd_while(halves, dying.kill, survivor, 60 + run)
    # KV was promised by an engine that is dead: the decode engine computes it itself.
    answer = await halves.ask(TEXT, late | {"kv_transfer_params": told["kv_transfer_params"]}, at=survivor.url)
    assert choices(answer) == choices(await halves.one_engine(TEXT, late, survivor))
    await halves.all_ready()
    await halves.nothing_held()
    body = {**GREEDY, "prompt": token_ids(80, seed=70_000 + run)}
    assert choices(await apart(halves, TEXT, body)) == choices(await halves.one_engine(TEXT, body))


@pytest.mark.parametrize("run", RUNS)
async def test_the_death_of_a_decode_engine_costs_no_answer(halves: Halves, run: int) -> None:
    await halves.all_ready()
    dying, others = halves.decodes[0], [*halves.prefills, *halves.decodes[1:]]
    await crowd_while(halves, dying.kill_server, others[0], 100 + run)
    await halves.nothing_held(*others)
    assert await halves.metric("evenhand_failovers_total", outcome="failed") == 0
