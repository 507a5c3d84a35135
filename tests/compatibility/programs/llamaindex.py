"""LlamaIndex's OpenAILike."""

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

llm = OpenAILike(
    model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, temperature=0, max_tokens=24, max_retries=0
)
messages = [ChatMessage(role="user", content=QUESTION)]

same(llm.complete(QUESTION).text, ANSWER)
works("complete")

same(llm.chat(messages).message.content, ANSWER)
works("chat")

same("".join(chunk.delta for chunk in llm.stream_chat(messages)), ANSWER)
works("stream_chat")

same(asyncio.run(llm.achat(messages)).message.content, ANSWER)
works("achat")

text = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=False, temperature=0, max_tokens=4)
assert text.complete("The sky is").text.strip()
works("complete by /v1/completions")
