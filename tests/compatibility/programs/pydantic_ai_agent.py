"""Pydantic AI's agents over OpenAI chat."""

import asyncio
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
settings = ModelSettings(temperature=0, max_tokens=80)


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "London"]
    capital: bool


answer = Agent(model, model_settings=settings).run_sync(QUESTION)
same((answer.output, answer.usage.output_tokens), (ANSWER, 8))
works("an agent's answer")


async def streamed() -> str:
    async with Agent(model, model_settings=settings).run_stream(QUESTION) as stream:
        return await stream.get_output()


same(asyncio.run(streamed()), ANSWER)
works("streamed")

asked = "Describe Paris."
same(type(Agent(model, output_type=NativeOutput(City), model_settings=settings).run_sync(asked).output), City)
works("an object by JSON schema")
same(type(Agent(model, output_type=City, model_settings=settings).run_sync(asked).output), City)
works("an object by a tool call")
