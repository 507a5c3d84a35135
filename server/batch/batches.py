"""What tenants may do with files and batches. Blocking work runs in one thread, in the order in which it was asked."""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import SEEK_END
from typing import BinaryIO, ParamSpec, TypeVar

import msgspec

from scheduler.jobs import Tier
from server.batch.files import Files, FilesUnavailable
from server.batch.objects import NEXT, Batch, Status, StoredFile
from server.batch.store import BatchStore, StoreUnavailable
from server.batch.validation import first_model
from server.connection.intake import BodyBudget
from server.request.errors import BadRequest, NotAllowed, NotFound, RateLimited, UnknownModel
from server.request.schemas import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from server.request.tenants import Tenant
from server.settings import BatchSettings

ENDPOINTS = tuple(route.path for route in (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS))
MAX_FILE_BYTES = 200 * 1024 * 1024
PURPOSES = ("batch",)
UNITS_S = {"m": 60, "h": 3600, "d": 86400}
LONGEST_WINDOW_S = 14 * 86400
ARRIVING_BYTES = 1024 * 1024 * 1024  # of uploads in the temporary folder
START_S = 5.0  # that files may take to say whose they are before the gateway starts without knowing
MAX_METADATA = (16, 64, 512)  # pairs, characters of a key, characters of a value

P = ParamSpec("P")
T = TypeVar("T")


class BatchRequest(msgspec.Struct):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


def window_s(text: str) -> int:
    """Seconds of a completion window such as `24h`, `90m` or `7d`. BadRequest if it is none."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and len(number) <= 6 and unit in UNITS_S):
        raise BadRequest(
            f"completion_window must be a number of minutes, hours or days such as '24h', not '{text[:20]}'.",
            param="completion_window",
        )
    seconds = int(number) * UNITS_S[unit]
    if not 60 <= seconds <= LONGEST_WINDOW_S:
        raise BadRequest("completion_window must be between 1m and 14d.", param="completion_window")
    return seconds


def _checked(metadata: dict[str, str] | None) -> dict[str, str] | None:
    pairs, longest_key, longest_value = MAX_METADATA
    for key, value in (metadata or {}).items():
        if len(key) > longest_key or len(value) > longest_value:
            raise BadRequest(
                f"metadata keys may have {longest_key} characters, values {longest_value}.", param="metadata"
            )
    if metadata is not None and len(metadata) > pairs:
        raise BadRequest(f"metadata may have {pairs} pairs, not {len(metadata)}.", param="metadata")
    return metadata


class Batches:
    """Files and batches by tenant. files: of the gateways that share the store. wall: seconds since 1970.

    changed: set when a batch may have work. usable: set once the files are known to be those of all these gateways.
    arriving: bytes of uploads in this process's temporary folder.
    """

    def __init__(self, files: Files, store: BatchStore, settings: BatchSettings, wall: Callable[[], float]) -> None:
        self.settings = settings
        self.wall = wall
        self.files = files
        self.store = store
        self.changed = asyncio.Event()
        self.usable = asyncio.Event()
        self._identity = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch store")
        # Files have threads of their own: a slow folder or bucket must hold up no lease, and an upload only others.
        self._contents = ThreadPoolExecutor(3, thread_name_prefix="batch files")
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="batch uploads")
        self._one_upload = asyncio.Lock()
        self.arriving = BodyBudget(ARRIVING_BYTES)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking function in the store's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def content(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking function that reads or writes contents, in a thread for that."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._contents, lambda: function(*args, **kwargs))

    async def _upload(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Runs a blocking function in the thread of uploads, after what it does already."""
        await asyncio.get_running_loop().run_in_executor(self._uploads, lambda: function(*args, **kwargs))

    def check_at_start(self) -> None:
        """`check` before there is an event loop. It must not hold up the start: FilesUnavailable after `START_S`."""
        try:
            identity = self._contents.submit(self.files.identity).result(START_S)
        except TimeoutError:
            raise FilesUnavailable("The files of batches do not answer.", retry_after_s=5) from None
        self._identify(identity)
        self.usable.set()

    async def check(self) -> None:
        """ValueError if gateways share the store, but not these files."""
        if not self.usable.is_set():
            identity = await self.content(self.files.identity)
            await self.call(self._identify, identity)
            self.usable.set()

    def _identify(self, identity: str) -> None:
        self.store.check(identity)
        self._identity = identity

    def new_id(self, prefix: str) -> str:
        """An id that nobody can guess. Ids of one prefix sort by the time at which they were made."""
        return f"{prefix}{int(self.wall() * 1000):012x}{secrets.token_hex(10)}"

    # files
    async def add_file(self, tenant: str, filename: str, purpose: str, source: BinaryIO) -> StoredFile:
        """Keeps an upload. BadRequest for a purpose that there is not, RateLimited past the tenant's quota."""
        if purpose not in PURPOSES:
            raise BadRequest(f"purpose must be 'batch', not '{purpose[:30]}'.", param="purpose")
        file_id = self.new_id("file-")
        size = await self.content(source.seek, 0, SEEK_END)
        async with self._one_upload:  # or two at once might exceed the quota
            await self.within_quota(tenant, size)
            try:
                await self._upload(self._copy, file_id, source)
                return await self.call(self.keep, file_id, tenant, filename[:255], purpose, size)
            except BaseException:
                # Nothing would know of the content. A record that was written, though nobody said so, goes with it.
                with suppress(FilesUnavailable, StoreUnavailable):
                    await self._upload(self.files.remove, file_id)  # a copy goes on though its request was cancelled
                    await self.call(self.store.remove_file, file_id)
                raise

    def _copy(self, file_id: str, source: BinaryIO) -> None:
        source.seek(0)
        with self.files.writing(file_id) as file:
            while piece := source.read(1024 * 1024):
                file.write(piece)

    def keep(self, file_id: str, tenant: str, filename: str, purpose: str, size: int) -> StoredFile:
        """Records a content that is there."""
        now = int(self.wall())
        kept = StoredFile(
            file_id, tenant, filename, purpose, size, now, now + int(self.settings.keep_days * UNITS_S["d"])
        )
        self.store.add_file(kept)
        return kept

    async def within_quota(self, tenant: str, more: int) -> None:
        """RateLimited if the tenant may not keep so many bytes more."""
        quota = self.settings.tenant_bytes
        if await self.call(self.store.stored_bytes, tenant) + more > quota:
            raise RateLimited(
                f"Your files would exceed {quota} bytes: delete some first.", code="storage_quota_exceeded"
            )

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        """NotFound for a file that there is not, or that is another tenant's."""
        found = await self.call(self.store.file, file_id)
        if found is None or found.tenant != tenant:
            raise NotFound(f"There is no file '{file_id[:100]}'.", code="file_not_found", param="file_id")
        return found

    async def list_files(self, tenant: str, after: str | None, limit: int) -> list[StoredFile]:
        return await self.call(self.store.files, tenant, after, limit)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """BadRequest while a batch reads it."""
        await self.file(tenant, file_id)
        if any(batch.input_file_id == file_id for batch in await self.call(self.store.running)):
            raise BadRequest(f"The file '{file_id}' is the input of a running batch: cancel it first.", param="file_id")
        await self._remove(file_id)

    async def _remove(self, file_id: str) -> None:
        await self.content(self.files.remove, file_id)
        await self.call(self.store.remove_file, file_id)

    async def sweep(self) -> int:
        """Removes files past their expiry; returns how many. Needs files that are `usable`."""
        expired = await self.call(self.store.expired_files, self.wall())
        for file in expired:
            await self._remove(file.id)
        await self.content(self.files.remove_parts, self.wall() - UNITS_S["d"])
        await self.content(self.files.renew, self._identity)  # last: it writes, which a full bucket refuses
        return len(expired)

    # batches
    async def create(self, tenant: Tenant, asked: BatchRequest) -> Batch:
        """Begins a batch. NotAllowed or UnknownModel if the tenant may not run what its file asks for."""
        if asked.endpoint not in ENDPOINTS:
            raise BadRequest(f"endpoint must be one of {', '.join(ENDPOINTS)}.", param="endpoint")
        seconds = window_s(asked.completion_window)
        metadata = _checked(asked.metadata)
        if Tier.FLEX not in tenant.tiers:
            raise NotAllowed(
                "Batches run in the service tier 'flex', which your tenant may not use: ask the operator to grant it.",
                code="service_tier_not_granted",
            )
        await self.file(tenant.name, asked.input_file_id)
        if tenant.models is not None:
            model = await self.content(self._first_model, asked.input_file_id)
            if model is not None and model not in tenant.models:
                raise UnknownModel(
                    f"Your tenant may not use the model '{model[:100]}' of the input file's first request.",
                    param="input_file_id",
                )
        now = int(self.wall())
        batch = Batch(
            id=self.new_id("batch_"),
            tenant=tenant.name,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + seconds,
            metadata=metadata,
        )
        await self.call(self.store.add_batch, batch)
        self.changed.set()
        return batch

    def _first_model(self, file_id: str) -> str | None:
        """The model of a file's first request; None if it has none: then what is wrong is said when it is checked."""
        try:
            file = self.files.open(file_id)
        except FileNotFoundError:
            return None
        with file:
            return first_model(file)

    async def batch(self, tenant: str, batch_id: str) -> Batch:
        """NotFound for a batch that there is not, or that is another tenant's."""
        found = await self.call(self.store.batch, batch_id)
        if found is None or found.tenant != tenant:
            raise NotFound(f"There is no batch '{batch_id[:100]}'.", code="batch_not_found", param="batch_id")
        return found

    async def list_batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        return await self.call(self.store.batches, tenant, after, limit)

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """The batch, which will be cancelled soon. BadRequest if it is over or about to be."""
        while True:
            batch = await self.batch(tenant, batch_id)
            if batch.status in (Status.CANCELLING, Status.CANCELLED):
                return batch
            if Status.CANCELLING not in NEXT[batch.status]:
                raise BadRequest(f"A batch that is {batch.status.value} cannot be cancelled.", code="batch_not_active")
            cancelling = batch.moved(Status.CANCELLING, int(self.wall()))
            if await self.call(self.store.update, cancelling, batch.status):
                self.changed.set()
                return cancelling

    async def cancel_any(self, batch_id: str) -> Batch:
        """`cancel` for an operator: the batch of any tenant."""
        found = await self.call(self.store.batch, batch_id)
        return await self.cancel("" if found is None else found.tenant, batch_id)

    async def recent(self, limit: int) -> list[Batch]:
        return await self.call(self.store.recent, limit)

    async def running(self) -> list[Batch]:
        return await self.call(self.store.running)

    def close(self) -> None:
        """Waits for what the threads are doing."""
        self._uploads.shutdown(wait=True)
        self._contents.shutdown(wait=True)
        self._thread.shutdown(wait=True)
        self.store.close()
