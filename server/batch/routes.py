"""`/v1/files` and `/v1/batches`, as OpenAI's clients call them."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import iterate_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.batch.batches import MAX_FILE_BYTES, Batches, BatchRequest
from server.batch.files import Files, FilesUnavailable, bounded, using_temporary_folder
from server.batch.objects import Batch
from server.request.errors import BadRequest, NotFound
from server.request.tenants import Tenant

FORM_BYTES = 64 * 1024  # what a form may have beside the file itself
_read = msgspec.json.Decoder(BatchRequest).decode
_LIMIT = Query(20, ge=1, le=100)
_FILE_LIMIT = Query(10_000, ge=1, le=10_000)


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _list(entries: list[dict[str, Any]], limit: int) -> Response:
    """A page: `entries` has one more than `limit` if there are more."""
    page = entries[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(entries) > limit
    return _json({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


@asynccontextmanager
async def arriving(request: Request, batches: Batches, tenant: str) -> AsyncIterator[tuple[UploadFile, str]]:
    """The file of a form and its purpose. What is in the temporary folder counts until the block is left.

    RateLimited before anything is read, if the tenant's quota has no room. FilesUnavailable while too many bytes of
    other uploads are there.
    """
    length = request.headers.get("content-length", "0")
    await batches.within_quota(tenant, max(0, int(length) - FORM_BYTES))
    held = 0

    async def counted() -> AsyncGenerator[bytes, None]:
        nonlocal held
        async for piece in bounded(request.stream(), MAX_FILE_BYTES + FORM_BYTES):
            if piece and not batches.arriving.take(tenant, len(piece)):
                raise FilesUnavailable("Too many uploads arrive at once: try again later.", retry_after_s=5)
            held += len(piece)
            yield piece

    try:
        file, purpose = await uploaded(request, counted())
        try:
            yield file, purpose
        finally:
            await file.close()
    finally:
        if held:
            batches.arriving.give_back(tenant, held)


async def uploaded(request: Request, stream: AsyncGenerator[bytes, None]) -> tuple[UploadFile, str]:
    """The file of a form and its purpose. The content goes to disk as it arrives."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("Send the file as multipart/form-data with the fields 'purpose' and 'file'.")
    try:
        with using_temporary_folder():
            form = await MultiPartParser(request.headers, stream, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise BadRequest(f"The form cannot be read: {error.message}") from None
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise BadRequest("The form has no file: send it as the field 'file'.", param="file")
    if not isinstance(purpose, str):
        raise BadRequest("The form has no 'purpose': send 'batch'.", param="purpose")
    return file, purpose


def batch_routes(batches: Batches, identify: Callable[[Request], Tenant]) -> APIRouter:
    """The routes. identify: the tenant of a request's key; raises if there is none."""
    router = APIRouter(tags=["batch"])
    router.include_router(_file_routes(batches, identify))

    @router.post("/v1/batches", summary="Run a file of requests in what others leave of the engines")
    async def create(request: Request) -> Response:
        tenant = identify(request)
        try:
            asked = _read(await request.body())
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"The request body is invalid: {error}.") from None
        return _json((await batches.create(tenant, asked)).public())

    @router.get("/v1/batches", summary="A tenant's batches, the newest first")
    async def listed(request: Request, after: str | None = None, limit: int = _LIMIT) -> Response:
        found = await batches.list_batches(identify(request).name, after, limit + 1)
        return _list([batch.public() for batch in found], limit)

    @router.get("/v1/batches/{batch_id}", summary="One batch")
    async def one(request: Request, batch_id: str) -> Response:
        return _json((await batches.batch(identify(request).name, batch_id)).public())

    @router.post("/v1/batches/{batch_id}/cancel", summary="End a batch; what has run is in its output")
    async def cancel(request: Request, batch_id: str) -> Response:
        return _json((await batches.cancel(identify(request).name, batch_id)).public())

    return router


def operator_routes(batches: Batches, authorize: Callable[[Request], None]) -> APIRouter:
    """Every tenant's batches, for operators and the console."""
    router = APIRouter(prefix="/admin/batches", tags=["admin"], dependencies=[Depends(authorize)])

    @router.get("", summary="The newest batches of all tenants")
    async def listed(limit: int = _LIMIT) -> Response:
        return _json({"batches": [_for_operators(batch) for batch in await batches.recent(limit)]})

    @router.post("/{batch_id}/cancel", summary="End any tenant's batch")
    async def cancel(batch_id: str) -> Response:
        return _json(_for_operators(await batches.cancel_any(batch_id)))

    return router


def _for_operators(batch: Batch) -> dict[str, Any]:
    told = batch.public()
    kept = ("id", "endpoint", "status", "created_at", "expires_at", "request_counts")
    return {name: told[name] for name in kept} | {"tenant": batch.tenant}


async def _begun(files: Files, file_id: str) -> AsyncIterator[bytes]:
    """A content's pieces. The first one is read before anything is answered: what fails then has a status."""
    pieces = iterate_in_threadpool(files.pieces(file_id))
    try:
        first = await anext(pieces, b"")
    except FileNotFoundError:
        raise NotFound(f"The content of '{file_id}' is gone.", code="file_not_found", param="file_id") from None

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_of_them()


def _file_routes(batches: Batches, identify: Callable[[Request], Tenant]) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/files", summary="Upload a batch's input, multipart/form-data, 200 MB at most")
    async def upload(request: Request) -> Response:
        tenant = identify(request)
        async with arriving(request, batches, tenant.name) as (file, purpose):
            kept = await batches.add_file(tenant.name, file.filename or "input.jsonl", purpose, file.file)
        return _json(kept.public())

    @router.get("/v1/files", summary="A tenant's files, the newest first")
    async def listed(request: Request, after: str | None = None, limit: int = _FILE_LIMIT) -> Response:
        found = await batches.list_files(identify(request).name, after, limit + 1)
        return _list([file.public() for file in found], limit)

    @router.get("/v1/files/{file_id}", summary="One file's record")
    async def one(request: Request, file_id: str) -> Response:
        return _json((await batches.file(identify(request).name, file_id)).public())

    @router.get("/v1/files/{file_id}/content", summary="One file's content")
    async def content(request: Request, file_id: str) -> Response:
        kept = await batches.file(identify(request).name, file_id)
        headers = {"content-length": str(kept.bytes)}
        pieces = await _begun(batches.files, kept.id)
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}", summary="Delete a file")
    async def delete(request: Request, file_id: str) -> Response:
        await batches.delete_file(identify(request).name, file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    return router
