"""Prompts of an exact number of tokens: as token ids, or as text made from our own list of words."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from random import Random

from loadtest.traces.hash_model import WORDS
from loadtest.traces.rows import Count

# Ids of ordinary tokens in every vocabulary we serve: above the special ones, below the smallest vocabulary.
_FIRST_ID, _LAST_ID = 1000, 30_000
_POOL_TOKENS = 1 << 17
_MARK_MASK = (1 << 14) - 1

# (seed of the call, tokens wanted, ids of shared blocks, tokens per block) → prompt
Prompts = Callable[[int, int, Sequence[int], int], list[int] | str]


def token_prompts(seed: int) -> Prompts:
    """Prompts as random token ids; equal block ids give equal tokens, so that prefix caches see what the trace saw.

    A piece is cut out of one long random sequence and marked at its beginning with what it stands for, so that it is
    made in microseconds, on the loop that measures, and no two begin alike that should not.
    """
    pool = Random(f"{seed}:ids").choices(range(_FIRST_ID, _LAST_ID), k=_POOL_TOKENS)

    def piece(name: str, tokens: int) -> list[int]:
        digest = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big")
        ids = [_FIRST_ID + (digest >> shift & _MARK_MASK) for shift in (0, 14, 28, 42)]
        at = digest % _POOL_TOKENS
        while len(ids) < tokens:
            ids += pool[at : at + tokens - len(ids)]
            at = 0
        return ids[:tokens]

    def make(call: int, tokens: int, blocks: Sequence[int], block_tokens: int) -> list[int]:
        ids: list[int] = []
        for block in blocks:
            if len(ids) + block_tokens > tokens:
                break
            ids += piece(f"block:{block}", block_tokens)
        return ids + piece(f"call:{call}", tokens - len(ids))

    return make


def token_count(tokenizer_folder: Path) -> Count:
    """Counts the tokens of a text with a model's tokenizer, without special ones. FileNotFoundError if it has none."""
    try:
        from tokenizers import Tokenizer  # comes with the model's extra; prompts as token ids need none
    except ImportError as error:
        raise ValueError("--tokenizer needs the package tokenizers: pip install tokenizers.") from error

    path = tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no tokenizer.json in {tokenizer_folder}: give the folder of a model.")
    tokenizer = Tokenizer.from_file(str(path))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


def text_prompts(seed: int, tokenizer_folder: Path | None = None) -> Prompts:
    """Prompts as text that a model's tokenizer reads as exactly so many tokens (without its chat template).

    Equal block ids give equal text, as with token ids. tokenizer_folder holds `tokenizer.json`; without it words are
    used that are one token each in every vocabulary that we know of, so the server's count says how exact that is.
    Raises FileNotFoundError, and ValueError where the tokenizer joins words.
    """
    count = token_count(tokenizer_folder) if tokenizer_folder is not None else None
    words = [word for word in WORDS if count is None or count(f" {word}") == count(word) == 1]

    def make(call: int, tokens: int, blocks: Sequence[int], block_tokens: int) -> str:
        said: list[str] = []
        for block in blocks[: tokens // block_tokens if block_tokens else 0]:
            said += Random(f"{seed}:block:{block}").choices(words, k=block_tokens)
        said += Random(f"{seed}:call:{call}").choices(words, k=tokens - len(said))
        text = " ".join(said)
        if count is not None and count(text) != tokens:
            raise ValueError(
                f"The tokenizer in {tokenizer_folder} joins words, so prompts of exact length need token ids."
            )
        return text

    return make
