import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from deploy.engine.canary import QUESTION, Canary, CanaryError

Body = dict[str, Any]
Answer = Callable[[str, Body], tuple[int, Any]]
PRIMES = "The first five prime numbers are 2, 3, 5, 7"


def chat(text: str | None) -> Body:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


async def heard(answer: Answer, model: str = "toy") -> str:
    def engine(request: httpx2.Request) -> httpx2.Response:
        status, body = answer(request.url.path, json.loads(request.content))
        return httpx2.Response(status, json=body)

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(engine)) as client:
        return await Canary(model).check(client, "http://engine")


async def test_an_engine_that_says_the_same_twice_may_join_and_is_asked_greedily_past_its_cache() -> None:
    asked: list[Body] = []

    def answer(path: str, body: Body) -> tuple[int, Any]:
        asked.append(body)
        return 200, chat("Lyon, I think.")

    assert await heard(answer) == "Lyon, I think."
    assert [body["temperature"] for body in asked] == [0, 0]
    assert asked[0]["messages"][0]["content"] == QUESTION
    assert asked[0]["cache_salt"] != asked[1]["cache_salt"]


async def test_the_bundled_model_must_give_its_recorded_answer() -> None:
    assert await heard(lambda path, body: (200, chat(PRIMES)), "smollm2") == PRIMES
    with pytest.raises(CanaryError, match=r"L'Étoile.*instead of.*enforce-eager.*dtype=float32"):
        await heard(lambda path, body: (200, chat("L'Étoile, la Marseillaise, la femme")), "smollm2")


async def test_an_engine_that_contradicts_itself_must_not_join() -> None:
    answers = iter(["Paris", "Paris, of course", "Lyon", "Rome"])
    said = "'Paris' and then with 'Paris, of course'.*on a CPU also --engine-arg=--dtype=float32"
    with pytest.raises(CanaryError, match=said):
        await heard(lambda path, body: (200, chat(next(answers))))


async def test_a_near_tie_that_falls_either_way_is_no_fault() -> None:
    answers = iter(["Paris", "Paris, of course", "Paris", "Paris"])
    assert await heard(lambda path, body: (200, chat(next(answers)))) == "Paris"


@pytest.mark.parametrize("silence", ["", "  \n", None])
async def test_an_engine_that_says_nothing_must_not_join(silence: str | None) -> None:
    with pytest.raises(CanaryError, match="with an empty text"):
        await heard(lambda path, body: (200, chat(silence)))


async def test_a_reasoning_models_thoughts_count_as_words() -> None:
    thinking = {"choices": [{"message": {"content": None, "reasoning_content": "Hmm, France."}}]}
    assert await heard(lambda path, body: (200, thinking)) == "Hmm, France."


async def test_a_model_without_a_chat_template_is_asked_for_a_completion() -> None:
    def answer(path: str, body: Body) -> tuple[int, Any]:
        return (
            (200, {"choices": [{"text": " It is Paris"}]})
            if path == "/v1/completions"
            else (400, {"error": "no template"})
        )

    assert await heard(answer) == " It is Paris"


async def test_a_model_that_only_embeds_is_asked_for_an_embedding() -> None:
    def answer(path: str, body: Body) -> tuple[int, Any]:
        return (200, {"data": [{"embedding": [0.25, -1.0]}]}) if path == "/v1/embeddings" else (404, {})

    assert await heard(answer) == "0.250,-1.000"


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (404, {}, "neither chat, completions nor embeddings"),
        (500, {"error": "boom"}, "status 500"),
        (200, [], "format of OpenAI's API"),
    ],
)
async def test_what_is_no_answer_is_said(status: int, body: object, sentence: str) -> None:
    with pytest.raises(CanaryError, match=sentence):
        await heard(lambda path, asked: (status, body))


async def test_a_dead_engine_is_a_failed_canary() -> None:
    def dead(path: str, body: Body) -> tuple[int, Any]:
        raise httpx2.ConnectError("connection refused")

    with pytest.raises(CanaryError, match="did not answer the canary: connection refused"):
        await heard(dead)
