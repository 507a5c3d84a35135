"""Prompts of an exact number of tokens: as token ids, or as text made from our own list of words."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from loadtest.traces.hash_model import WORDS

# Ids of ordinary tokens in every vocabulary we serve: above the special ones, below the smallest vocabulary.
_FIRST_ID, _LAST_ID = 1000, 30_000

# (seed of the call, tokens wanted, ids of shared blocks, tokens per block) → prompt
Prompts = Callable[[int, int, Sequence[int], int], list[int] | str]


def token_prompts(seed: int) -> Prompts:
    """Prompts as random token ids; equal block ids give equal tokens, so that prefix caches see what the trace saw."""

    def make(call: int, tokens: int, blocks: Sequence[int], block_tokens: int) -> list[int]:
        ids: list[int] = []
        for block in blocks:
            if len(ids) + block_tokens > tokens:
                break
            ids += _ids(Random(f"{seed}:block:{block}"), block_tokens)
        return ids + _ids(Random(f"{seed}:call:{call}"), tokens - len(ids))

    return make


def _ids(rng: Random, tokens: int) -> list[int]:
    return rng.choices(range(_FIRST_ID, _LAST_ID), k=tokens)


def text_prompts(seed: int, tokenizer_folder: Path) -> Prompts:
    """Prompts as text that a model's tokenizer reads as exactly so many tokens (without its chat template).

    Equal block ids give equal text, as with token ids. tokenizer_folder holds `tokenizer.json`. Raises
    FileNotFoundError, and ValueError where the tokenizer joins words.
    """
    from tokenizers import Tokenizer  # comes with the engine; prompts as token ids need none

    path = tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no tokenizer.json in {tokenizer_folder}: give the folder of a model.")
    tokenizer = Tokenizer.from_file(str(path))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    words = [word for word in WORDS if count(f" {word}") == count(word) == 1]

    def make(call: int, tokens: int, blocks: Sequence[int], block_tokens: int) -> str:
        said: list[str] = []
        for block in blocks[: tokens // block_tokens if block_tokens else 0]:
            said += Random(f"{seed}:block:{block}").choices(words, k=block_tokens)
        said += Random(f"{seed}:call:{call}").choices(words, k=tokens - len(said))
        text = " ".join(said)
        if count(text) != tokens:
            raise ValueError(
                f"The tokenizer in {tokenizer_folder} joins words, so prompts of exact length need token ids."
            )
        return text

    return make
