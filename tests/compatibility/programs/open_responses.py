"""The scenarios of Open Responses' compliance tests, their answers and events held to its published types.

Temperature is 0 and tools are `strict`, because the model is small. A field that is missing, or of the wrong type, is a
failure.
"""

import json
from enum import Enum
from typing import Any

import httpx2
import openresponses_types
from openresponses_types import ResponseResource
from pydantic import BaseModel
from told import ANSWER, KEY, MODEL, QUESTION, URL, same, works

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
client = httpx2.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=120)


def events_by_type() -> dict[str, type[BaseModel]]:
    """The type of each event, by its name on the wire."""
    found: dict[str, type[BaseModel]] = {}
    for name in dir(openresponses_types):
        kind = getattr(openresponses_types, name)
        if name.endswith("StreamingEvent") and isinstance(kind, type):
            named = kind.model_fields["type"].annotation
            assert isinstance(named, type) and issubclass(named, Enum)
            found |= {str(member.value): kind for member in named}
    return found


EVENTS = events_by_type()


def message(role: str, content: object) -> dict[str, object]:
    return {"type": "message", "role": role, "content": content}


def ask(*inputs: dict[str, object], **fields: object) -> dict[str, Any]:
    """The answer in one piece."""
    body = {"model": MODEL, "input": inputs, "temperature": 0} | fields
    answer = client.post(f"{URL}/responses", json=body)
    same(answer.status_code, 200)
    data: dict[str, Any] = answer.json()
    ResponseResource.model_validate(data)
    return data


def stream(*inputs: dict[str, object], **fields: object) -> list[dict[str, Any]]:
    """The events of a streamed answer, in the order of their numbers."""
    body = {"model": MODEL, "input": inputs, "temperature": 0, "stream": True} | fields
    answer = client.post(f"{URL}/responses", json=body)
    same((answer.status_code, answer.headers["content-type"].split(";")[0]), (200, "text/event-stream"))
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    same([event["sequence_number"] for event in events], list(range(len(events))))
    return events


def text_of(response: dict[str, Any]) -> str:
    [said] = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for part in said["content"])


whole = ask(message("user", QUESTION))
same((whole["status"], text_of(whole)), ("completed", ANSWER))
works("an answer")

events = stream(message("user", QUESTION))
same(text_of(events[-1]["response"]), ANSWER)
same("".join(event["delta"] for event in events if event["type"] == "response.output_text.delta"), ANSWER)
works("streamed")

same(ask(message("system", "You answer in French."), message("user", "Say hello."))["status"], "completed")
works("a system message")

called = ask(message("user", "What is the weather in Paris?"), tools=[WEATHER], tool_choice="required")
[call] = [item for item in called["output"] if item["type"] == "function_call"]
same((call["name"], json.loads(call["arguments"]).keys()), ("get_weather", {"city"}))
works("a tool call")

events = stream(message("user", "What is the weather in Paris?"), tools=[WEATHER], tool_choice="required")
kinds = [event["type"] for event in events]
items = [event["item"]["type"] for event in events if event["type"].startswith("response.output_item.")]
same(items.count("function_call"), 2)
assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(kinds), kinds
works("a streamed tool call")

turns = [
    message("user", "My name is Alice."),
    message("assistant", "Hello Alice!"),
    message("user", "What is my name?"),
]
assert "Alice" in text_of(ask(*turns))
works("several turns")

image = [
    {"type": "input_text", "text": "What is this?"},
    {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"},
]
refused = client.post(f"{URL}/responses", json={"model": MODEL, "input": [message("user", image)]})
same((refused.status_code, refused.json()["error"]["type"]), (400, "invalid_request_error"))
works("an image, refused as the model has no eyes")
