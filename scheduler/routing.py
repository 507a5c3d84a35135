"""Which worker gets a request: the one that is least busy, unless another remembers the prompt and is not much busier.

Engines keep the KV cache of prompts that they have read (vLLM's automatic prefix caching, SGLang's RadixAttention), so
a conversation's next turn costs least where its last one was. Nothing of a prompt is kept here but hashes.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from math import inf
from types import MappingProxyType

from scheduler.pools import TYPICAL_TOKENS, Pool, WorkerLoad
from scheduler.workers import Role

AFFINITY = 0.5  # of a batch: a worker that is fuller than another by more gets no request for what it remembers
SHORTEST_BYTES = 64  # vLLM caches whole blocks, of 16 tokens by default
LONGEST_BYTES = 1 << 20
WORKERS_EACH = 4
MOST_BEGINNINGS = 50_000
LEARN_SHARE = 0.05
LOOKS = 32  # workers of a pool that one request looks at, at most

Beginning = tuple[int, int]  # hash of the prompt's first bytes, and how many tokens they are


ANY_ROLE = frozenset(Role)


def score(load: WorkerLoad, typical_tokens: float, known_tokens: int) -> float:
    """How well a worker would do; the lowest score is the best.

    typical_tokens: of one request, prompt and answer. known_tokens: of this prompt, what the worker has probably read.

    The load is the share of its batch that its work would fill with typical requests, or of its memory if that is
    more. What it remembers counts against that, up to `AFFINITY`: half of it for a typical request's worth of tokens,
    so that a short system prompt, which everybody has, does not bring everybody to one worker.
    """
    work_tokens = load.pending_tokens + load.others * typical_tokens
    busy = work_tokens / (load.worker.slots * typical_tokens)
    if load.kv_usage > busy:
        busy = load.kv_usage
    return busy - AFFINITY * known_tokens / (known_tokens + typical_tokens)


def cheapest_of_all(pools: Sequence[Pool], typical_tokens: float, known: Mapping[str, int]) -> WorkerLoad | None:
    """`Choice.cheapest` for a request of one answer that any worker may be given; None while none has room."""
    found: list[WorkerLoad] = []
    for pool in pools:
        pool.typical_tokens = typical_tokens
        if (first := pool.first()) is not None:
            found.append(first)
        for worker_id in known:
            if (owner := pool.workers.get(worker_id)) is not None and owner.free > 0:
                found.append(owner)
    return _cheapest(found, typical_tokens, known)


def _cheapest(found: Sequence[WorkerLoad], typical_tokens: float, known: Mapping[str, int]) -> WorkerLoad | None:
    """The one with the lowest score; of equals the one that has been there longest."""
    if len(found) < 2:
        return found[0] if found else None
    best, lowest = found[0], inf
    for load in found:
        cost = score(load, typical_tokens, known.get(load.worker.id, 0))
        if cost < lowest or (cost == lowest and load.number < best.number):
            best, lowest = load, cost
    return best


class Choice:
    """The workers as one request sees them: those that remember its prompt, and the least loaded of each pool.

    sequences: answers that it asks for. A worker with room for all of them goes before one that has less.
    known: of its prompt, the tokens that a worker has probably read before, by the worker's id.
    avoid: a worker that it is not given as long as there is another. admits: which of those with room it may be given,
    None for all.
    """

    __slots__ = ("_admits", "_avoided", "_owners", "_pools", "_sequences", "_typical_tokens", "known")

    def __init__(
        self,
        pools: Sequence[Pool],
        typical_tokens: float,
        *,
        sequences: int = 1,
        known: Mapping[str, int] = MappingProxyType({}),
        avoid: str = "",
        admits: Callable[[WorkerLoad], bool] | None = None,
    ) -> None:
        self._admits = admits
        self._pools = pools
        self._typical_tokens = typical_tokens
        self._sequences = sequences
        self.known = known
        self._avoided = avoid
        if avoid and not any(self._count(pool) for pool in pools):
            self._avoided = ""
        self._owners: list[WorkerLoad] = []
        for pool in pools:
            pool.typical_tokens = typical_tokens
            if known:
                self._owners += [pool.workers[owner] for owner in known if owner in pool.workers]

    def has(self, role: Role) -> bool:
        """Whether a worker of this role is up, whether it has room or not."""
        return any(pool.role is role and self._count(pool) for pool in self._pools)

    def _count(self, pool: Pool) -> int:
        return len(pool.workers) - (self._avoided in pool.workers)

    def cost(self, load: WorkerLoad) -> float:
        """What workers are compared by; the lowest is the best."""
        return score(load, self._typical_tokens, self.known.get(load.worker.id, 0))

    def cheapest(
        self, roles: Collection[Role] = ANY_ROLE, fits: Callable[[WorkerLoad], bool] | None = None
    ) -> WorkerLoad | None:
        """The best worker of these roles that has room and fits; None if there is none among those looked at.

        Those are the owners of the prompt's beginnings and, of each pool, the least loaded `LOOKS` workers up to the
        first that fits: whoever comes behind it has more to do, and remembers nothing of this prompt.
        """
        if self._sequences == 1 and fits is self._admits is None and not self._avoided:
            if roles is ANY_ROLE:
                return cheapest_of_all(self._pools, self._typical_tokens, self.known)
            found = [load for load in self._owners if load.free > 0 and load.role in roles]
            for pool in self._pools:
                if pool.role in roles and (first := pool.first()) is not None:
                    found.append(first)
        else:
            found = self._looked_at(roles, fits)
        return _cheapest(found, self._typical_tokens, self.known)

    def _looked_at(self, roles: Collection[Role], fits: Callable[[WorkerLoad], bool] | None) -> list[WorkerLoad]:
        """Those with room for all sequences; if there are none, those with the most room."""
        suits = [load for load in self._owners if self._suits(load, fits) and load.role in roles]
        for pool in self._pools:
            if pool.role in roles:
                for load in islice(pool.in_order(), LOOKS):
                    if self._suits(load, fits):
                        suits.append(load)
                        if load.free >= self._sequences:
                            break
        needed = min(self._sequences, max((load.free for load in suits), default=1))
        return [load for load in suits if load.free >= needed]

    def _suits(self, load: WorkerLoad, fits: Callable[[WorkerLoad], bool] | None) -> bool:
        if load.free <= 0 or load.worker.id == self._avoided or (self._admits is not None and not self._admits(load)):
            return False
        return fits is None or fits(load)


@cache
def _member_name(content_field: str) -> bytes:
    return b'"%b"' % content_field.encode()


def beginnings(body: bytes, content_field: str, prompt_tokens: int) -> list[Beginning]:
    """The beginnings of a request's prompt, shortest first, each twice as long as the one before.

    Taken from the body's bytes behind the name of the field that holds the prompt: a conversation's next turn repeats
    them. What follows the prompt in the body may be part of the longest, which then matches nothing.
    """
    start = max(0, body.find(_member_name(content_field)))
    size = len(body) - start
    longest = min(size, LONGEST_BYTES)
    found: list[Beginning] = []
    length = SHORTEST_BYTES
    while length <= longest:
        found.append((hash(body[start : start + length]), prompt_tokens * length // size))
        length *= 2
    return found


def block_beginnings(blocks: Sequence[int], block_tokens: int) -> list[Beginning]:
    """`beginnings` of a prompt of which only the ids of its blocks are known, equal where two prompts begin alike."""
    lengths = (1 << power for power in range(len(blocks).bit_length()))
    return [(hash(tuple(blocks[:length])), length * block_tokens) for length in lengths]


class TypicalRequest:
    """How large requests are, averaged over the last ones."""

    __slots__ = ("output_tokens", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = self.output_tokens = TYPICAL_TOKENS / 2

    def learn(self, prompt_tokens: int, output_tokens: float) -> None:
        """A request is complete. output_tokens: of one of its answers."""
        self.prompt_tokens += LEARN_SHARE * (prompt_tokens - self.prompt_tokens)
        self.output_tokens += LEARN_SHARE * (output_tokens - self.output_tokens)

    @property
    def tokens(self) -> float:
        """Prompt and answer."""
        return self.prompt_tokens + self.output_tokens


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
        readers = self._readers
        alone = (worker_id,)
        for key, _ in prompt:
            before = readers.pop(key, None)
            if before is None or before == alone:
                readers[key] = alone
            elif worker_id in before:
                readers[key] = (worker_id, *(other for other in before if other != worker_id))
            else:
                readers[key] = (worker_id, *before[: WORKERS_EACH - 1])
        while len(readers) > self._most:
            readers.popitem(last=False)
