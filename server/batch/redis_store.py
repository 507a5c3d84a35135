"""`BatchStore` in Redis, for gateways on several machines: one Lua script for each step that must be whole.

All keys share one hash tag, so a Redis Cluster keeps them together. Times are Redis's own, so that the clocks of the
gateways' machines may differ.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import msgspec
from redis import Redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from server.batch.files import NoSpace
from server.batch.objects import RUNNING, Batch, BatchLine, Result, Status, StoredFile
from server.batch.store import LeaseLost, StoreUnavailable

log = logging.getLogger("evenhand.batch")

TIMEOUT_S = 5.0  # a page of results may be some megabytes
CONNECT_S = 1.0

# KEYS of the scripts for a batch: see `_of`. They answer -1 to an owner who is out.
_HEAD = """
local state, owners, claims, open, lines, texts, answered, refused = unpack(KEYS)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function retire(lease)
  local latest = redis.call('ZREVRANGE', owners, 0, 0, 'WITHSCORES')
  if #latest > 0 and tonumber(latest[2]) <= now then  -- nobody could renew
    for _, owner in ipairs(redis.call('ZRANGE', owners, 0, -1)) do redis.call('ZADD', owners, now + lease, owner) end
    return
  end
  local late = redis.call('ZRANGEBYSCORE', owners, '-inf', now)
  if #late == 0 then return end
  local out = {}
  for _, owner in ipairs(late) do
    out[owner] = true
    redis.call('ZREM', owners, owner)
  end
  local held = redis.call('HGETALL', claims)
  for i = 1, #held, 2 do
    if out[held[i + 1]] then
      redis.call('HDEL', claims, held[i])
      redis.call('ZADD', open, held[i], held[i])
    end
  end
end
"""

_LEASE = """
-- KEYS[9]: ids of running batches. ARGV: owner, ttl in ms, id.
local until_ms = tonumber(redis.call('HGET', state, 'lease_until') or '')
if not until_ms or not redis.call('ZSCORE', KEYS[9], ARGV[3]) then return 0 end
if redis.call('HGET', state, 'owner') ~= ARGV[1] and until_ms > now then return 0 end
redis.call('HSET', state, 'owner', ARGV[1], 'lease_until', now + ARGV[2])
return 1
"""

_UPDATE = """
-- KEYS[9], [10]: records of batches, ids of running ones. ARGV: id, status before, owner or "", status, total, record,
-- 1 if it is over.
if redis.call('HGET', state, 'status') ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' and redis.call('HGET', state, 'owner') ~= ARGV[3] then return 0 end
redis.call('HSET', state, 'status', ARGV[4], 'total', ARGV[5])
redis.call('HSET', KEYS[9], ARGV[1], ARGV[6])
if ARGV[7] == '1' then
  redis.call('ZREM', KEYS[10], ARGV[1])
  redis.call('UNLINK', owners, claims, open, lines, texts, answered, refused)
end
return 1
"""

_ADD_LINES = """
-- ARGV: owner, then number and line of each.
if redis.call('HGET', state, 'owner') ~= ARGV[1] then return -1 end
for i = 2, #ARGV, 2 do
  if redis.call('HEXISTS', texts, ARGV[i]) == 0 and redis.call('HSETNX', lines, ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('ZADD', open, ARGV[i], ARGV[i])
  end
end
return 1
"""

_JOIN = """
-- ARGV: owner, ttl in ms.
if redis.call('EXISTS', state) == 0 then return -1 end
retire(ARGV[2])
redis.call('ZADD', owners, now + ARGV[2], ARGV[1])
return 1
"""

_RENEW = """
-- ARGV: owner, ttl in ms.
retire(ARGV[2])
if not redis.call('ZSCORE', owners, ARGV[1]) then return -1 end
redis.call('ZADD', owners, now + ARGV[2], ARGV[1])
return 1
"""

_CLAIM = """
-- ARGV: owner, most.
if not redis.call('ZSCORE', owners, ARGV[1]) then return -1 end
local held, mine = redis.call('HGETALL', claims), {}
for i = 1, #held, 2 do
  if held[i + 1] == ARGV[1] then mine[#mine + 1] = held[i] end
end
local share = math.ceil(redis.call('ZCARD', open) / redis.call('ZCARD', owners))
local more = math.min(ARGV[2] - #mine, share)
if more > 0 then
  for _, number in ipairs(redis.call('ZRANGE', open, 0, more - 1)) do
    redis.call('ZREM', open, number)
    redis.call('HSET', claims, number, ARGV[1])
    mine[#mine + 1] = number
  end
end
local found = {}
for i, number in ipairs(mine) do found[i] = redis.call('HGET', lines, number) end
return found
"""

_LEAVE = """
-- ARGV: owner.
local held = redis.call('HGETALL', claims)
for i = 1, #held, 2 do
  if held[i + 1] == ARGV[1] then
    redis.call('HDEL', claims, held[i])
    redis.call('ZADD', open, held[i], held[i])
  end
end
redis.call('ZREM', owners, ARGV[1])
if redis.call('HGET', state, 'owner') == ARGV[1] then redis.call('HSET', state, 'lease_until', 0) end
return 1
"""

_RECORD = """
-- ARGV: owner, then number, 1 if it is an answer, and text of each.
if not redis.call('ZSCORE', owners, ARGV[1]) then return -1 end
for i = 2, #ARGV, 3 do
  local number = ARGV[i]
  if redis.call('HGET', claims, number) == ARGV[1] then
    redis.call('HDEL', claims, number)
    redis.call('HDEL', lines, number)
    redis.call('HSET', texts, number, ARGV[i + 2])
    if ARGV[i + 1] == '1' then
      redis.call('ZADD', answered, number, number)
      redis.call('HINCRBY', state, 'completed', 1)
    else
      redis.call('ZADD', refused, number, number)
      redis.call('HINCRBY', state, 'failed', 1)
    end
  end
end
return 1
"""

_ADD_FILE = """
-- KEYS: records, expiry, the tenant's, bytes by tenant. ARGV: id, record, expiry, tenant, bytes.
if redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
redis.call('HINCRBY', KEYS[4], ARGV[4], ARGV[5])
return 1
"""

_REMOVE_FILE = """
-- KEYS, ARGV: as for a file that is added; the record is ignored.
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
if redis.call('HINCRBY', KEYS[4], ARGV[4], -ARGV[5]) <= 0 then redis.call('HDEL', KEYS[4], ARGV[4]) end
return 1
"""

T = TypeVar("T")
_encode = msgspec.json.encode
_read_file = msgspec.json.Decoder(StoredFile).decode
_read_batch = msgspec.json.Decoder(Batch).decode
_read_line = msgspec.json.Decoder(BatchLine).decode


class RedisBatchStore:
    """Gateways of many machines. `prefix` keeps several systems apart in one Redis."""

    def __init__(self, url: str, *, prefix: str = "evenhand", timeout_s: float = TIMEOUT_S) -> None:
        """ValueError for an address that is none."""
        # What a failed command should have done is done again by whoever asked: no retries here.
        self._redis = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=min(CONNECT_S, timeout_s),
            retry=Retry(NoBackoff(), 0),
        )
        self._tag = f"{{{prefix}}}:batch"
        self._add_file, self._remove_file = self._script(_ADD_FILE), self._script(_REMOVE_FILE)
        self._lease, self._update = self._script(_HEAD + _LEASE), self._script(_HEAD + _UPDATE)
        self._add_lines, self._join = self._script(_HEAD + _ADD_LINES), self._script(_HEAD + _JOIN)
        self._renew, self._claim = self._script(_HEAD + _RENEW), self._script(_HEAD + _CLAIM)
        self._leave, self._record = self._script(_HEAD + _LEAVE), self._script(_HEAD + _RECORD)

    def _script(self, text: str) -> Script:
        return self._redis.register_script(text)

    def _key(self, name: str) -> str:
        return f"{self._tag}:{name}"

    def _of(self, batch_id: str) -> list[str]:
        """A batch's keys: its state (hash), who has joined (until when), claimed lines (by whom), open lines, lines
        without a result, results, numbers of those for the output file, of those for the error file."""
        kinds = ("state", "owners", "claims", "open", "lines", "texts", "answered", "refused")
        return [self._key(f"{batch_id}:{kind}") for kind in kinds]

    def _asked(self, command: Callable[[], Any]) -> Any:
        try:
            return command()
        except OutOfMemoryError:
            raise NoSpace("Redis is full: give it more memory (maxmemory).", retry_after_s=60) from None
        except (RedisError, OSError) as error:
            said = str(error) or type(error).__name__
            raise StoreUnavailable(f"The Redis of batches does not answer: {said}.", retry_after_s=5) from None

    def _run(self, script: Script, keys: Sequence[str], *arguments: str | int | bytes) -> Any:
        return self._asked(lambda: script(keys, arguments))

    def _run_as_owner(self, script: Script, batch_id: str, *arguments: str | int | bytes) -> Any:
        answer = self._run(script, self._of(batch_id), *arguments)
        if answer == -1:
            raise LeaseLost(batch_id)
        return answer

    def check(self, folder_id: str) -> None:
        key = self._key("folder")
        known = self._asked(lambda: self._redis.get(key))
        if known is None:  # the first one to ask says which it is
            self._asked(lambda: self._redis.setnx(key, folder_id))
            known = self._asked(lambda: self._redis.get(key))
        if known != folder_id.encode():
            raise ValueError(
                "the batch folder or bucket is not the one of the other gateways that share this Redis: use the same "
                f"one at all of them, or, if it is to be another one from now on, delete the key '{key}'"
            )
        self._warn_of_loss()

    def _warn_of_loss(self) -> None:
        """Logs what in Redis's own settings can lose batches."""
        told = cast(dict[str, Any], self._asked(self._redis.info))
        if not told.get("aof_enabled"):
            log.warning("batches are in a Redis without an append-only file and lost when it restarts: appendonly yes")
        if str(told.get("maxmemory_policy", "noeviction")).startswith("allkeys"):
            log.warning("batches are in a Redis that evicts keys when it is full: maxmemory-policy noeviction")

    # files
    def _file_keys(self, tenant: str) -> list[str]:
        return [self._key("files"), self._key("expiry"), self._key(f"files of:{tenant}"), self._key("bytes")]

    def add_file(self, file: StoredFile) -> None:
        told = (file.id, _encode(file), file.expires_at, file.tenant, file.bytes)
        self._run(self._add_file, self._file_keys(file.tenant), *told)

    def file(self, file_id: str) -> StoredFile | None:
        record = self._asked(lambda: self._redis.hget(self._key("files"), file_id))
        return None if record is None else _read_file(record)

    def files(self, tenant: str, after: str | None, limit: int) -> list[StoredFile]:
        return self._page(self._key(f"files of:{tenant}"), self._key("files"), after, limit, _read_file)

    def _page(self, index: str, records: str, after: str | None, limit: int, read: Callable[[bytes], T]) -> list[T]:
        """Records whose ids an index has, the newest first, those behind `after` only."""
        newest = "+" if after is None else f"({after}"
        ids = self._asked(lambda: self._redis.zrevrangebylex(index, newest, "-", 0, limit))
        return self._read(records, ids, read)

    def _read(self, records: str, ids: Sequence[bytes], read: Callable[[bytes], T]) -> list[T]:
        found = self._asked(lambda: self._redis.hmget(records, list(ids))) if ids else []
        return [read(record) for record in found if record is not None]

    def remove_file(self, file_id: str) -> None:
        file = self.file(file_id)
        if file is not None:
            told = (file.id, b"", file.expires_at, file.tenant, file.bytes)
            self._run(self._remove_file, self._file_keys(file.tenant), *told)

    def expired_files(self, now: float) -> list[StoredFile]:
        read = {batch.input_file_id for batch in self.running()}
        ids = self._asked(lambda: self._redis.zrangebyscore(self._key("expiry"), "-inf", now))
        expired = self._read(self._key("files"), ids, _read_file)
        return sorted((file for file in expired if file.id not in read), key=lambda file: file.id)

    def stored_bytes(self, tenant: str) -> int:
        return int(self._asked(lambda: self._redis.hget(self._key("bytes"), tenant)) or 0)

    # batches
    def add_batch(self, batch: Batch) -> None:
        (state, *_) = self._of(batch.id)
        started = {"status": batch.status.value, "owner": ""} | dict.fromkeys(
            ("total", "completed", "failed", "lease_until"), "0"
        )
        pipeline = self._redis.pipeline(transaction=True)
        for name, value in started.items():
            pipeline.hsetnx(state, name, value)
        pipeline.hsetnx(self._key("batches"), batch.id, _encode(batch))
        for index in (f"batches of:{batch.tenant}", "all", "running"):
            pipeline.zadd(self._key(index), {batch.id: 0})
        self._asked(pipeline.execute)

    def batch(self, batch_id: str) -> Batch | None:
        record = self._asked(lambda: self._redis.hget(self._key("batches"), batch_id))
        return None if record is None else self._counted([_read_batch(record)])[0]

    def _counted(self, batches: list[Batch]) -> list[Batch]:
        pipeline = self._redis.pipeline(transaction=False)
        for batch in batches:
            pipeline.hmget(self._of(batch.id)[0], ["total", "completed", "failed"])
        counts = self._asked(pipeline.execute) if batches else []
        return [
            msgspec.structs.replace(batch, total=int(total), completed=int(completed), failed=int(failed))
            for batch, (total, completed, failed) in zip(batches, counts, strict=True)
        ]

    def batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        records = self._key("batches")
        return self._counted(self._page(self._key(f"batches of:{tenant}"), records, after, limit, _read_batch))

    def running(self) -> list[Batch]:
        ids = self._asked(lambda: self._redis.zrange(self._key("running"), 0, -1))
        return self._counted(self._read(self._key("batches"), ids, _read_batch))

    def recent(self, limit: int) -> list[Batch]:
        return self._counted(self._page(self._key("all"), self._key("batches"), None, limit, _read_batch))

    def lease(self, batch_id: str, owner: str, lease_s: float) -> bool:
        keys = [*self._of(batch_id), self._key("running")]
        return bool(self._run(self._lease, keys, owner, _ms(lease_s), batch_id))

    def update(self, batch: Batch, before: Status, owner: str | None = None) -> bool:
        keys = [*self._of(batch.id), self._key("batches"), self._key("running")]
        over = int(batch.status not in RUNNING)
        told = (batch.id, before.value, owner or "", batch.status.value, batch.total, _encode(batch), over)
        return bool(self._run(self._update, keys, *told))

    # lines
    def add_lines(self, batch_id: str, owner: str, lines: Sequence[BatchLine]) -> None:
        told = [part for line in lines for part in (line.number, _encode(line))]
        self._run_as_owner(self._add_lines, batch_id, owner, *told)

    def join(self, batch_id: str, owner: str, lease_s: float) -> None:
        self._run_as_owner(self._join, batch_id, owner, _ms(lease_s))

    def renew(self, batch_id: str, owner: str, lease_s: float) -> None:
        self._run_as_owner(self._renew, batch_id, owner, _ms(lease_s))

    def claim(self, batch_id: str, owner: str, most: int) -> list[BatchLine]:
        found = self._run_as_owner(self._claim, batch_id, owner, most)
        return sorted((_read_line(line) for line in found), key=lambda line: line.number)

    def leave(self, batch_id: str, owner: str) -> None:
        self._run(self._leave, self._of(batch_id), owner)

    def unfinished(self, batch_id: str) -> int:
        return int(self._asked(lambda: self._redis.hlen(self._of(batch_id)[4])))

    def record(self, batch_id: str, owner: str, results: Iterable[Result]) -> None:
        told = [part for result in results for part in (result.number, int(result.ok), result.text)]
        self._run_as_owner(self._record, batch_id, owner, *told)

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        *_, texts, answered, refused = self._of(batch_id)
        index = answered if ok else refused
        numbers = self._asked(lambda: self._redis.zrangebyscore(index, f"({after}", "+inf", 0, limit))
        found = self._asked(lambda: self._redis.hmget(texts, numbers)) if numbers else []
        return [Result(int(number), ok, text) for number, text in zip(numbers, found, strict=True) if text is not None]

    def close(self) -> None:
        self._redis.close()


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
