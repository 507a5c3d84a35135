"""The official openai client for Python against the whole system with a real engine."""

import json

import openai
import pytest
from openai import OpenAI

from tests.end_to_end.conftest import LIMIT_S, Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def test_a_chat_answer_is_right(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(model=stack.model, messages=QUESTION, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_answer_is_right_as_sampled_by_default(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(model=stack.model, messages=QUESTION, seed=1)
    assert "Paris" in answer.choices[0].message.content


def test_a_streamed_answer_is_the_same_and_tells_no_usage_unasked(stack: Stack) -> None:
    stream = stack.client.chat.completions.create(
        model=stack.model, messages=QUESTION, temperature=0, max_tokens=24, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_with_a_stream_that_asks_for_it(stack: Stack) -> None:
    stream = stack.client.chat.completions.create(
        model=stack.model,
        messages=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    last = list(stream)[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_completions_take_text_and_token_ids(stack: Stack) -> None:
    text = stack.client.completions.create(model=stack.model, prompt="The sky is", temperature=0, max_tokens=4)
    assert text.usage.completion_tokens == 4
    ids = stack.client.completions.create(model=stack.model, prompt=[504, 6376, 314], temperature=0, max_tokens=4)
    assert ids.usage.prompt_tokens == 3


def test_two_choices_come_with_n_2(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model=stack.model, messages=QUESTION, n=2, max_tokens=8, temperature=0.8, seed=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_a_stop_string_ends_the_answer(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model=stack.model, messages=QUESTION, temperature=0, max_tokens=24, stop=[" France"]
    )
    assert answer.choices[0].message.content == "The capital of"


def test_logprobs_pass_through(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model=stack.model, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    tokens = answer.choices[0].logprobs.content
    assert [token.token for token in tokens][:2] == ["The", " capital"]
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_a_json_schema_is_kept(stack: Stack) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": False,
    }
    answer = stack.client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        temperature=0,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "capital"}


def test_tool_calls_are_what_the_engine_itself_answers(stack: Stack) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}, "required": ["city"]}
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "temperature": 0,
        "max_tokens": 60,
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }
    direct = OpenAI(base_url=f"{stack.engine_url}/v1", api_key=stack.engine_key)
    ours, engines = (client.chat.completions.create(**body).choices[0] for client in (stack.client, direct))
    assert ours.message.tool_calls[0].function == engines.message.tool_calls[0].function
    assert ours.message.tool_calls[0].function.name == "weather"
    assert ours.finish_reason == engines.finish_reason


def test_responses_answer(stack: Stack) -> None:
    answer = stack.client.responses.create(model=stack.model, input="What is the capital of France?", temperature=0)
    assert answer.output_text == ANSWER


def test_a_client_that_leaves_frees_the_engine_at_once(stack: Stack) -> None:
    made = stack.engine_made()
    stream = stack.client.chat.completions.create(
        model=stack.model, messages=QUESTION, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    until(lambda: stack.engine_running() > 0, LIMIT_S, "the engine runs it")
    stream.close()
    until(lambda: stack.engine_running() == 0, LIMIT_S, "the engine has let go of it")
    assert stack.engine_made() - made < 500, "of 1,500 tokens it has made no more than until it heard of it"


def test_an_unknown_model_is_a_404(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here") as caught:
        stack.client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_too_long_a_prompt_is_a_400_that_says_so(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        stack.client.chat.completions.create(
            model=stack.model, messages=[{"role": "user", "content": "word " * 5000}], max_tokens=8
        )
    assert caught.value.code == "context_length_exceeded"


def test_a_steering_field_is_refused(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match="not allowed on") as caught:
        stack.client.chat.completions.create(model=stack.model, messages=QUESTION, extra_body={"priority": 1})
    assert caught.value.param == "priority"


def test_the_model_is_listed(stack: Stack) -> None:
    assert [model.id for model in stack.client.models.list()] == [stack.model]
