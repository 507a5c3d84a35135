"""LiteLLM's library as a client, as an OpenAI-compatible server and as a vLLM."""

import asyncio

import litellm
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

litellm.suppress_debug_info = True  # it writes where we tell what worked
asked = {
    "messages": [{"role": "user", "content": QUESTION}],
    "api_base": URL,
    "api_key": KEY,
    "temperature": 0,
    "max_tokens": 24,
    "num_retries": 0,
}

for provider in ("openai", "hosted_vllm"):
    name = f"{provider}/{MODEL}"
    answer = litellm.completion(model=name, **asked)
    same((answer.choices[0].message.content, answer.usage.completion_tokens), (ANSWER, 8))
    chunks = list(litellm.completion(model=name, stream=True, stream_options={"include_usage": True}, **asked))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), ANSWER)
    same(litellm.stream_chunk_builder(chunks).usage.completion_tokens, 8)
    works(f"completion and stream as {provider}")

same(asyncio.run(litellm.acompletion(model=f"openai/{MODEL}", **asked)).choices[0].message.content, ANSWER)
works("acompletion")

try:
    litellm.completion(model="openai/no-such-model", **asked)
    raise SystemExit("an unknown model was answered")
except litellm.NotFoundError:
    works("errors as its own exceptions")
