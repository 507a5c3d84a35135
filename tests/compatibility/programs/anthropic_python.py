"""The official anthropic client for Python, on /v1/messages."""

import anthropic
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

client = anthropic.Anthropic(base_url=URL.removesuffix("/v1"), api_key=KEY, max_retries=0)
asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
asked["extra_body"] = {"temperature": 0}  # Anthropic's own newest models have none, so the client has no name for it

answer = client.messages.create(**asked)
same((answer.content[0].text, answer.stop_reason), (ANSWER, "end_turn"))
works("messages")

with client.messages.stream(**asked) as stream:
    same("".join(stream.text_stream), ANSWER)
    same(stream.get_final_message().usage.output_tokens, answer.usage.output_tokens)
works("streams with usage")

try:
    client.messages.create(**asked | {"model": "no-such-model"})
    raise SystemExit("an unknown model was answered")
except anthropic.NotFoundError as error:
    same(error.body["error"]["type"], "not_found_error")
works("errors as its own exceptions")
