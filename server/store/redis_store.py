"""`Store` in Redis: one Lua script per exchange, so that a gateway writes and reads at one moment in one round trip.

The script reads what all replicas changed, so its keys must be in one Redis; `ShardedStore` divides rows among several.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from secrets import token_hex
from typing import TypeVar, cast

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MovedError, RedisError

from server.store.store import SLICE, Kept, News, Offer, StoreAway

TIMEOUT_S = 1.0
REDIS_PORT = 6379
IN_CLUSTER = "is a node of a Redis Cluster, which is not supported: name one or several servers outside a cluster"
SEPARATOR = "\x1f"  # between the parts of a row's name; no tenant, model or period has it

_EXCHANGE = """
-- KEYS: meta, alive, rows, changes. A row's name is L|replica|key or K|period|name|replica, with | for the separator.
-- ARGV: replica, ttl in ms, cursor, generation as the replica knows it, a fresh generation, separator, and the rows in
-- JSON: names of live rows, their values, names of kept rows, their values; values are strings. The answer is JSON,
-- too: one string each way, because redis-py spends about 4 us on each element of a command or an answer.
local meta, alive, rows, changes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local replica, sep = ARGV[1], ARGV[6]
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local gone = redis.call('ZRANGEBYSCORE', alive, '-inf', now_ms)
if #gone > 0 then
  local dead = {}
  for _, name in ipairs(gone) do
    dead[name] = true
    redis.call('ZREM', alive, name)
  end
  for _, row in ipairs(redis.call('ZRANGE', changes, 0, -1)) do
    if string.sub(row, 1, 2) == 'L' .. sep then
      local owner = string.sub(row, 3, string.find(row, sep, 3, true) - 1)
      if dead[owner] then
        redis.call('ZREM', changes, row)
        redis.call('HDEL', rows, row)
      end
    end
  end
end

local generation = redis.call('HGET', meta, 'generation')
if not generation then
  generation = ARGV[5]
  redis.call('HSET', meta, 'generation', generation)
end
local known = redis.call('ZSCORE', alive, replica) and 1 or 0
redis.call('ZADD', alive, now_ms + ARGV[2], replica)
local seq = redis.call('HINCRBY', meta, 'seq', 1)

-- Many rows take one command each way: what Redis does grows with the rows that changed, not with the gateways.
local CHUNK = 1000
local function write(names, values)
  for first = 1, #names, CHUNK do
    local fields, scored = {}, {}
    for i = first, math.min(first + CHUNK - 1, #names) do
      fields[#fields + 1], fields[#fields + 2] = names[i], values[i]
      scored[#scored + 1], scored[#scored + 2] = seq, names[i]
    end
    redis.call('HSET', rows, unpack(fields))
    redis.call('ZADD', changes, unpack(scored))
  end
end
local function values_of(names)
  local values = {}
  for first = 1, #names, CHUNK do
    local last = math.min(first + CHUNK - 1, #names)
    for i, value in ipairs(redis.call('HMGET', rows, unpack(names, first, last))) do
      values[first + i - 1] = value
    end
  end
  return values
end

local live_names, live_values, kept_names, kept_values = unpack(cjson.decode(ARGV[7]))
write(live_names, live_values)
local larger_names, larger_values = {}, {}
for i, before in ipairs(values_of(kept_names)) do
  if tonumber(kept_values[i]) > tonumber(before or -1) then
    larger_names[#larger_names + 1], larger_values[#larger_values + 1] = kept_names[i], kept_values[i]
  end
end
write(larger_names, larger_values)

local cursor = generation == ARGV[4] and ARGV[3] or '0'
local own, names = 'L' .. sep .. replica .. sep, {}
for _, row in ipairs(redis.call('ZRANGEBYSCORE', changes, '(' .. cursor, '+inf')) do
  if string.sub(row, 1, #own) ~= own then
    names[#names + 1] = row
  end
end
local values = values_of(names)
local version = tonumber(redis.call('HGET', meta, 'version') or 0)
return cjson.encode({generation, seq, known, version, redis.call('ZRANGE', alive, 0, -1), names, values})
"""

_FORGET = """
-- KEYS: rows, changes. ARGV: how the names of the rows begin that go.
for _, row in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if string.sub(row, 1, #ARGV[1]) == ARGV[1] then
    redis.call('ZREM', KEYS[2], row)
    redis.call('HDEL', KEYS[1], row)
  end
end
"""

_WORKERS = """
-- KEYS: expiry, workers. ARGV: id, value ("" to leave), ttl in ms; none to list them all. A worker that says that it
-- is there gets no list: a thousand workers that do so every other second would read half a million rows a second.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[1] and ARGV[2] ~= '' then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ARGV[1])
elseif ARGV[1] then
  redis.call('ZADD', KEYS[1], 0, ARGV[1])
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms)) do
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[1], id)
end
if ARGV[1] then
  return {}
end
return redis.call('HGETALL', KEYS[2])
"""

T = TypeVar("T")


class RedisStore:
    """Gateways of many processes and machines. `prefix` keeps several systems apart in one Redis."""

    def __init__(
        self, url: str, *, prefix: str = "evenhand", timeout_s: float = TIMEOUT_S, named: bool = False
    ) -> None:
        """ValueError for an address that is none. named: problems say which Redis has them."""
        # Nobody waits for an exchange, and the next one repeats what a failed one should have written: no retries here.
        # No socket_timeout, the time is kept by `_asked`: redis-py's is asyncio.wait_for, which under Python 3.11 loses
        # a cancellation that comes in the moment in which a command was sent; whoever cancelled would wait for ever.
        self._redis = Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._timeout_s = timeout_s
        self._name = f"the Redis at {self.address}" if named else "Redis"
        self._tag = f"{{{prefix}}}"
        self._exchange = self._redis.register_script(_EXCHANGE)
        self._forget = self._redis.register_script(_FORGET)
        self._workers = self._redis.register_script(_WORKERS)

    @property
    def address(self) -> str:
        """HOST:PORT/DATABASE, or the path of a socket with its database; without a password."""
        known = self._redis.connection_pool.connection_kwargs
        database = known.get("db", 0)
        if "path" in known:
            return f"{known['path']}/{database}"
        return f"{known.get('host', 'localhost')}:{known.get('port', REDIS_PORT)}/{database}"

    def _keys(self, *names: str) -> list[str]:
        return [f"{self._tag}:{name}" for name in names]

    async def exchange(self, offer: Offer) -> News:
        live = [SEPARATOR.join(("L", offer.replica, key)) for key in offer.live]
        kept = [SEPARATOR.join(("K", *row)) for row in offer.kept]
        rows = orjson.dumps([live, list(offer.live.values()), kept, [str(amount) for amount in offer.kept.values()]])
        head = (offer.replica, round(offer.ttl_s * 1000), offer.cursor, offer.generation, token_hex(8), SEPARATOR)
        keys = self._keys("meta", "alive", "rows", "changes")
        answer = await self._asked(self._exchange(keys, [*head, rows]))
        return await _news(answer)

    async def forget(self, period: str) -> None:
        await self._asked(self._forget(self._keys("rows", "changes"), [SEPARATOR.join(("K", period, ""))]))

    async def put(self, kind: str, name: str, value: str) -> None:
        meta, records = self._keys("meta", f"records:{kind}")
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(records, name, value)
        pipeline.hincrby(meta, "version", 1)
        await self._asked(pipeline.execute())

    async def drop(self, kind: str, name: str) -> bool:
        meta, records = self._keys("meta", f"records:{kind}")
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hdel(records, name)
        pipeline.hincrby(meta, "version", 1)
        dropped, _ = await self._asked(pipeline.execute())
        return bool(dropped)

    async def records(self, kind: str) -> dict[str, str]:
        return await self._asked(cast(Awaitable[dict[str, str]], self._redis.hgetall(*self._keys(f"records:{kind}"))))

    async def shelve(self, shelf: str, name: str, value: str, ttl_s: float) -> None:
        (key,) = self._keys(f"shelf:{shelf}")
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(key, name, value)
        pipeline.pexpire(key, round(ttl_s * 1000))
        await self._asked(pipeline.execute())

    async def shelved(self, shelf: str) -> dict[str, str]:
        return await self._asked(cast(Awaitable[dict[str, str]], self._redis.hgetall(*self._keys(f"shelf:{shelf}"))))

    async def register(self, worker_id: str, value: str, ttl_s: float) -> None:
        await self._ask_workers([worker_id, value, round(ttl_s * 1000)])

    async def leave(self, worker_id: str) -> None:
        await self._ask_workers([worker_id, ""])

    async def workers(self) -> dict[str, str]:
        return await self._ask_workers([])

    async def _ask_workers(self, arguments: Sequence[str | int]) -> dict[str, str]:
        pairs = await self._asked(self._workers(self._keys("expiry", "workers"), arguments))
        return dict(zip(pairs[::2], pairs[1::2], strict=True))

    async def _asked(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError:
            raise StoreAway(f"{self._name} does not answer within {self._timeout_s:g} s") from None
        except (MovedError, ClusterDownError):
            raise StoreAway(f"{self._name} {IN_CLUSTER}") from None
        except (RedisError, OSError) as error:
            raise StoreAway(f"{self._name} does not answer: {str(error) or type(error).__name__}") from None

    async def close(self) -> None:
        await self._redis.aclose()


async def _news(answer: str) -> News:
    # An empty list of Lua is an empty object in JSON.
    generation, seq, known, version, alive, names, values = orjson.loads(answer)
    live: dict[str, dict[str, str]] = {}
    kept: dict[Kept, int] = {}
    for number, (name, value) in enumerate(zip(names, values, strict=True), 1):
        if number % SLICE == 0:
            await asyncio.sleep(0)
        kind, rest = name.split(SEPARATOR, 1)
        if kind == "L":
            replica, key = rest.split(SEPARATOR, 1)
            live.setdefault(replica, {})[key] = value
        else:
            period, row, replica = rest.split(SEPARATOR)
            kept[period, row, replica] = int(value)
    return News(generation, seq, bool(known), version, frozenset(alive), live, kept)
