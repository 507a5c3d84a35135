"""Tests a started engine with a prompt whose greedy answer is known, before it receives requests.

An engine can compute nonsense and answer it with status 200 (seen with bfloat16, compiled, on a CPU without bfloat16
instructions), and no health check sees that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from deploy.model.model import BUNDLED

# Along this answer the bundled model's second-best token is never closer than 0.65 logits, so that honest bfloat16 on a
# GPU says the same; on many other questions two tokens are so near that rounding decides.
QUESTION = "List the first five prime numbers."
ANSWER_TOKENS = 17
# What the model said in float32, eagerly, when it was recorded: the answer must begin with this.
RECORDED: Mapping[str, str] = {BUNDLED: "The first five prime numbers are 2, 3, 5"}
NO_SUCH_TASK = {400, 404, 405, 422, 501}
WHAT_TO_DO = (
    "its arithmetic cannot be trusted, most often because of compilation, of the number format on a CPU, or of a "
    "quantization that the GPU does not support: try --engine-arg=--enforce-eager, then on a CPU also "
    "--engine-arg=--dtype=float32"
)


class CanaryError(Exception):
    """The engine must not join; the message says what it did and what to try."""


@dataclass(frozen=True, slots=True)
class Task:
    """One way to test an engine: the path, the body besides model and salt, and whether the answer is text."""

    path: str
    body: Mapping[str, Any]
    is_text: bool = True


GREEDY = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
# The first that the engine can do is asked: chat, plain completion (no chat template), embedding (no text at all).
TASKS = (
    Task("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], **GREEDY}),
    Task("/v1/completions", {"prompt": QUESTION, **GREEDY}),
    Task("/v1/embeddings", {"input": QUESTION}, is_text=False),
)


@dataclass(frozen=True, slots=True)
class Canary:
    """The test of one model's engine. `timeout_s` bounds one answer."""

    model: str
    recorded: Mapping[str, str] = field(default_factory=lambda: RECORDED)
    timeout_s: float = 300.0

    async def check(self, client: httpx2.AsyncClient, url: str) -> str:
        """Asks the engine at `url` twice; returns what it said. CanaryError when it must not join."""
        for task in TASKS:
            first = await self._ask(client, url, task, salt="canary-1")
            if first is None:
                continue
            # Another salt, so that the prefix cache does not shorten the second computation: it would then differ in
            # shape from the first, and half precision may tell shapes apart where nothing is wrong.
            again = await self._ask(client, url, task, salt="canary-2") or ""
            if first != again:
                # Experts, or sums over several GPUs, may be added in another order each time, and a near tie between
                # two tokens falls either way. Arithmetic that cannot be trusted hardly says the same thing twice.
                more = [await self._ask(client, url, task, salt=f"canary-{number}") or "" for number in (3, 4)]
                again = first if len({first, again, *more}) < 4 else again
            self._judge(task, first, again)
            return first
        raise CanaryError("the engine offers neither chat, completions nor embeddings, so it cannot serve this model")

    async def responds(self, client: httpx2.AsyncClient, url: str, timeout_s: float) -> bool:
        """Whether a question of one token is answered in time, be it with an error."""
        body = {"model": self.model, "prompt": "1", "max_tokens": 1, "input": "1"}
        for path in ("/v1/completions", "/v1/embeddings"):
            try:
                answer = await client.post(url + path, json=body, timeout=timeout_s)
            except httpx2.TimeoutException:
                return False
            except httpx2.HTTPError:
                return True  # its health tells more
            if answer.status_code not in NO_SUCH_TASK:
                break
        return True

    async def _ask(self, client: httpx2.AsyncClient, url: str, task: Task, salt: str) -> str | None:
        """The answer as text, None where the engine does not do this task."""
        body = {"model": self.model, "cache_salt": salt, **task.body}
        try:
            answer = await client.post(url + task.path, json=body, timeout=self.timeout_s)
        except httpx2.HTTPError as error:
            raise CanaryError(f"the engine did not answer the canary: {error or type(error).__name__}") from error
        if answer.status_code in NO_SUCH_TASK:
            return None
        if answer.status_code != 200:
            raise CanaryError(f"the engine answered the canary with status {answer.status_code}: {answer.text[:200]}")
        try:
            return said(answer.json(), task.is_text)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CanaryError(
                f"the engine's answer to the canary is not in a format of OpenAI's API: {answer.text[:200]}"
            ) from error

    def _judge(self, task: Task, first: str, again: str) -> None:
        if not first.strip():
            raise CanaryError(f"the engine answered {QUESTION!r} with an empty text; {WHAT_TO_DO}")
        if first != again:
            raise CanaryError(f"the engine answered {QUESTION!r} with {first!r} and then with {again!r}; {WHAT_TO_DO}")
        wanted = self.recorded.get(self.model)
        if task.is_text and wanted and not first.strip().startswith(wanted):
            raise CanaryError(f"the engine answered {QUESTION!r} with {first!r} instead of {wanted!r}; {WHAT_TO_DO}")


def said(answer: Mapping[str, Any], is_text: bool) -> str:
    """What an OpenAI-shaped answer says, in one string that two runs can be compared by."""
    if not is_text:
        return ",".join(f"{number:.3f}" for number in answer["data"][0]["embedding"])
    choice = answer["choices"][0]
    if "message" not in choice:
        return str(choice["text"])
    message = choice["message"]
    return str(message.get("content") or message.get("reasoning_content") or message.get("reasoning") or "")
