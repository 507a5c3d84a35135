"""The official openai client for Python."""

import asyncio

import openai
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}

whole = client.chat.completions.create(**asked)
same(whole.choices[0].message.content, ANSWER)
same(whole.usage.completion_tokens, 8)
works("chat")

with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
    said = stream.get_final_completion()
same((said.choices[0].message.content, said.usage.completion_tokens), (ANSWER, 8))
works("streams with usage")


async def at_once() -> list[str]:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as other:
        answers = await asyncio.gather(*(other.chat.completions.create(**asked) for _ in range(8)))
    return [answer.choices[0].message.content for answer in answers]


same(asyncio.run(at_once()), [ANSWER] * 8)
works("eight at once (asyncio)")

text = client.completions.create(model=MODEL, prompt="The sky is", temperature=0, max_tokens=4)
same(text.usage.completion_tokens, 4)
works("completions")

same(client.responses.create(model=MODEL, input=QUESTION, temperature=0).output_text, ANSWER)
with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as events:
    same(events.get_final_response().output_text, ANSWER)
works("responses, streamed too")

same([model.id for model in client.models.list()], [MODEL])
works("models")

try:
    client.chat.completions.create(**asked | {"model": "no-such-model"})
    raise SystemExit("an unknown model was answered")
except openai.NotFoundError as error:
    same(error.code, "model_not_found")
works("errors as its own exceptions")
