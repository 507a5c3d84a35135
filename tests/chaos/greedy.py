"""Whether an answer is greedy, up to rounding: an engine reads it, alone, and says how likely each of its tokens is.

An engine rounds its sums differently in another batch. Where two tokens are as good as equally likely the other one may
then win, and all that follows is another answer, as good as the first. A token that is lost, repeated or swapped is no
such tie: it, or what follows it, is far from the most likely one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tests.chaos.load import CHAT, COMPLETIONS, Question, Told
from tests.chaos.site import ask

# Natural logarithms. Rounding moves float32 sums by about 1e-5 here; the second best is 0.4 below the best in the mean.
TIE = 1e-3
_AT_LENGTH = ("length", "max_tokens", "incomplete")  # how the APIs say that an answer ended at its limit
_HALF = "\N{REPLACEMENT CHARACTER}"  # how many stand for half a character depends on where a text is cut


@dataclass(frozen=True, slots=True)
class Verdict:
    """gap: how far the least of the answer's tokens is below the most likely one in its place, as a difference of
    logarithms. problem: what is wrong with the answer, "" if it is greedy up to rounding."""

    gap: float
    problem: str = ""


class Judge:
    """Judges answers of a fixed length by an engine that nobody else asks anything.

    An answer of /v1/responses or /v1/messages tells no token ids: those of its text are taken, so the model must say
    nothing but tokens whose text has no other ids.
    """

    def __init__(self, model: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    async def verdict(self, port: int, question: Question, said: Told) -> Verdict:
        (text, ids, finish), usage = said
        if question.path not in (CHAT, COMPLETIONS):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        prompt = await prompt_ids(port, question)
        below = await gaps(port, prompt, ids)
        gap = max(below, default=0.0)
        length = next(question.body[name] for name in ("max_tokens", "max_output_tokens") if name in question.body)
        counted = (usage["prompt_tokens"], usage["completion_tokens"])
        if len(ids) != length or finish not in _AT_LENGTH or counted != (len(prompt), length):
            return Verdict(gap, f"{len(ids)} tokens of {length}, ends with {finish}, counted {counted}")
        if self.plain(ids) != text.replace(_HALF, ""):
            return Verdict(gap, f"its text is not that of its tokens: {text!r}")
        at = next((number for number, one in enumerate(below) if one > TIE), None)
        return Verdict(gap, "" if at is None else f"token {at} is {below[at]:.3g} below the best one")

    def plain(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the signs that stand for half a character."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).replace(_HALF, "")


async def prompt_ids(port: int, question: Question) -> list[int]:
    """What the engine makes of a question."""
    if question.path not in (CHAT, COMPLETIONS):
        turns = question.body.get("messages") or [{"role": "user", "content": question.body["input"]}]
        question = Question(CHAT, {"model": question.body["model"], "messages": turns})
    asked = {name: question.body[name] for name in ("model", "messages", "prompt") if name in question.body}
    reply = await ask(port, "/tokenize", asked)
    assert reply.status == 200, reply.body[:300]
    return list(reply.json()["tokens"])


async def gaps(port: int, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """How far each of these tokens is below the most likely one in its place, given the prompt and those before it."""
    body = {"model": "fake", "prompt": [*prompt, *ids], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    reply = await ask(port, COMPLETIONS, body)
    assert reply.status == 200, reply.body[:300]
    likely = reply.json()["choices"][0]["prompt_logprobs"][len(prompt) :]
    return [
        max(one["logprob"] for one in place.values()) - place[str(token)]["logprob"]
        for token, place in zip(ids, likely, strict=True)
    ]
