"""instructor over the openai client: answers as objects."""

import asyncio
from typing import Literal

import instructor
import openai
from pydantic import BaseModel
from told import KEY, MODEL, URL, works


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "London"]
    capital: bool


asked = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Describe Paris as JSON."}],
    "response_model": City,
    "temperature": 0,
    "max_tokens": 80,
    "max_retries": 0,
}
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)

assert isinstance(instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).create(**asked), City)
works("an object by JSON schema")

partial = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).create_partial(**asked)
last = list(partial)[-1]
assert last.name in ("Paris", "London") and last.capital in (True, False), last
works("a streamed object")

other = instructor.from_openai(openai.AsyncOpenAI(base_url=URL, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
assert isinstance(asyncio.run(other.create(**asked)), City)
works("asyncio")
