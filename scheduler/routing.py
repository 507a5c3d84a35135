"""Which worker gets a request: the one that is least busy, unless another remembers the prompt and is not much busier.

Engines keep the KV cache of prompts that they have read (vLLM's automatic prefix caching, SGLang's RadixAttention), so
a conversation's next turn costs least where its last one was. Nothing of a prompt is kept here but hashes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AFFINITY = 0.5  # of a batch: a worker that is fuller than another by more gets no request for what it remembers
SHORTEST_BYTES = 64  # vLLM caches whole blocks, of 16 tokens by default
LONGEST_BYTES = 1 << 20
WORKERS_EACH = 4
MOST_BEGINNINGS = 50_000

Beginning = tuple[int, int]  # hash of the prompt's first bytes, and how many tokens they are


@dataclass(frozen=True, slots=True)
class RouteOption:
    """A worker that has room, as one request sees it.

    slots: sequences that its batch holds.
    pending_tokens: tokens that it has yet to compute for this gateway.
    others: sequences that it has from elsewhere.
    kv_usage: share of its KV cache in use, 0 to 1.
    known_tokens: how much of the prompt it has probably read before.
    """

    slots: int
    pending_tokens: int = 0
    others: int = 0
    kv_usage: float = 0.0
    known_tokens: int = 0


def score(option: RouteOption, typical_tokens: float) -> float:
    """How well a worker would do; the lowest score is the best. typical_tokens: of one request, prompt and answer.

    The load is the share of its batch that its work would fill with typical requests, or of its memory if that is
    more. What it remembers counts against that, up to `AFFINITY`: half of it for a typical request's worth of tokens,
    so that a short system prompt, which everybody has, does not bring everybody to one worker.
    """
    work_tokens = option.pending_tokens + option.others * typical_tokens
    load = max(work_tokens / (option.slots * typical_tokens), option.kv_usage)
    return load - AFFINITY * option.known_tokens / (option.known_tokens + typical_tokens)


def best(options: Sequence[RouteOption], typical_tokens: float) -> int:
    """Index of the option with the lowest score; the first of equals. ValueError if there is none."""
    return min(range(len(options)), key=lambda index: score(options[index], typical_tokens))


def beginnings(body: bytes, content_field: str, prompt_tokens: int) -> list[Beginning]:
    """The beginnings of a request's prompt, shortest first, each twice as long as the one before.

    Taken from the body's bytes behind the name of the field that holds the prompt: a conversation's next turn repeats
    them. What follows the prompt in the body may be part of the longest, which then matches nothing.
    """
    start = max(0, body.find(b'"%b"' % content_field.encode()))
    size = len(body) - start
    found: list[Beginning] = []
    length = SHORTEST_BYTES
    while length <= min(size, LONGEST_BYTES):
        found.append((hash(body[start : start + length]), prompt_tokens * length // size))
        length *= 2
    return found


class Affinity:
    """Which workers read which beginnings lately. Holds at most `most` of them; the longest unused goes first."""

    def __init__(self, most: int = MOST_BEGINNINGS) -> None:
        self._most = most
        self._readers: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._readers)

    def known(self, prompt: Sequence[Beginning]) -> Mapping[str, int]:
        """Tokens of this prompt that a worker has probably read before, by its id; none are left out."""
        tokens_known: dict[str, int] = {}
        for key, tokens in prompt:
            for worker_id in self._readers.get(key, ()):
                tokens_known[worker_id] = tokens
        return tokens_known

    def note(self, prompt: Sequence[Beginning], worker_id: str) -> None:
        """A worker is going to read this prompt."""
        for key, _ in prompt:
            others = [other for other in self._readers.pop(key, ()) if other != worker_id]
            self._readers[key] = (worker_id, *others[: WORKERS_EACH - 1])
        while len(self._readers) > self._most:
            self._readers.popitem(last=False)
