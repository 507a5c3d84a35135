"""LangChain's ChatOpenAI."""

import asyncio
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

chat = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=24, max_retries=0)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "London"]
    unit: Literal["celsius", "fahrenheit"]


answer = chat.invoke(QUESTION)
same((answer.content, answer.usage_metadata["output_tokens"]), (ANSWER, 8))
works("invoke")

same("".join(chunk.content for chunk in chat.stream(QUESTION)), ANSWER)
works("stream")

same([one.content for one in asyncio.run(chat.abatch([QUESTION] * 4))], [ANSWER] * 4)
works("abatch of 4")

longer = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=80, max_retries=0)
found = longer.with_structured_output(Weather, method="json_schema").invoke("How warm is it in Paris?")
same(type(found), Weather)
works("structured output by JSON schema")

(call,) = longer.bind_tools([Weather], tool_choice="Weather", strict=True).invoke("How warm is it in Paris?").tool_calls
same((call["name"], set(call["args"])), ("Weather", {"city", "unit"}))
works("a strict tool call")
