"""What operators do while the gateway runs, under a key of their own: workers, model names, adapters,
tenants, the policy."""

import hmac
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from msgspec.structs import replace
from starlette.responses import JSONResponse

from scheduler.catalog import build
from scheduler.workers import Worker
from server.admission.dispatch import Lines
from server.admission.limits import Gate
from server.admission.live_adapters import LOADED
from server.admission.live_policy import LivePolicy
from server.cluster.local_sync import LocalSync
from server.cluster.records import ADAPTER, DRAINED, LIVE, MODEL, POLICY, TENANT, PolicyRecord, Records
from server.fleet.fleet import Fleet, described
from server.fleet.registry import registration_from
from server.request.adapters import AdapterRecord, read_adapter
from server.request.directory import UNMETERED, Tenants, bearer
from server.request.errors import BadRequest, NotAllowed, NoWorker, ServiceError, UnknownKey
from server.request.names import NameRecord, read_name
from server.request.tenants import KeyRecord, TenantRecord, digest_of, hashed, index_of, key_id, new_key, read_record
from server.store.store import StoreAway

WORKER_FIELDS = ("url", "role", "slots", "key", "ca", "cert", "cert_key")


class Conflict(ServiceError):
    status = 409
    kind = "invalid_request_error"
    code = "conflict"


class Unknown(ServiceError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class StoreUnreachable(ServiceError):
    status = 503
    code = "store_unreachable"


@dataclass(slots=True)
class Admin:
    """What the routes act on. key: the operators' own; None refuses everybody. wall: seconds since 1970.

    pseudonym: what the log calls a tenant. metered: costs are counted here.
    """

    key: str | None
    tenants: Tenants
    gate: Gate
    policy: LivePolicy
    lines: Lines
    fleet: Fleet
    records: Records
    siblings: LocalSync
    wall: Callable[[], float]
    pseudonym: Callable[[str], str]
    metered: bool

    def authorize(self, request: Request) -> None:
        """Raises NotAllowed where no admin key is set, UnknownKey for another one."""
        if self.key is None:
            raise NotAllowed("/admin is closed: start the gateway with EVENHAND_ADMIN_KEY set to use it.")
        authorization = request.headers.get("authorization")
        given = bearer(authorization.encode("latin-1")) if authorization is not None else None
        # Digests, so that not even the length of the key shows in the time this takes.
        if given is None or not hmac.compare_digest(digest_of(given), digest_of(self.key.encode())):
            raise UnknownKey("The admin key is missing or wrong: send it as 'Authorization: Bearer KEY'.")

    # tenants
    def tenant(self, name: str) -> TenantRecord:
        record = self.tenants.record(name)
        if record is not None:
            return record
        raise Unknown(f"There is no tenant {name!r}.", param="name")

    def described_tenant(self, record: TenantRecord) -> dict[str, Any]:
        """A tenant without its keys: they are named by the beginning of their digest."""
        keys = [{"id": key_id(key.key), "expires": key.expires} for key in record.credentials]
        in_file = record.name in self.tenants.names_in_file()
        told = record.described()
        source = "file" if in_file else "store"
        name, used = self.pseudonym(record.name), self.gate.usage(record.name)
        return {**told, "keys": keys, "source": source, "used": used, "log_name": name}

    async def put_tenant(self, record: TenantRecord) -> None:
        """Writes a tenant; the other gateways have it an exchange later."""
        if record.name in self.tenants.names_in_file():
            raise Conflict(f"Tenant {record.name!r} comes from the tenant file: change it there.")
        if record.budget.in_money and not self.metered:
            raise BadRequest(f"Tenant {record.name!r} {UNMETERED}.", param="budget")
        others = [other for other in self.tenants.all() if other.name != record.name]
        try:
            index_of([*others, record])
        except ValueError as error:
            raise BadRequest(f"{error}.", param="keys") from None
        await self.write(self.records.store.put(TENANT, record.name, msgspec.json.encode(record).decode()))

    async def drop_tenant(self, name: str) -> None:
        if name in self.tenants.names_in_file():
            raise Conflict(f"Tenant {name!r} comes from the tenant file: delete it there.")
        self.tenant(name)
        await self.write(self.records.store.drop(TENANT, name))

    async def write(self, change: Awaitable[object]) -> None:
        """Changes a record, and has it in force here at once."""
        try:
            await change
            await self.records.read()
        except StoreAway as error:
            raise StoreUnreachable(f"{error}. The change may not have been made.", retry_after_s=5.0) from None

    # model names
    def described_name(self, name: str) -> dict[str, Any]:
        """A model name, what it resolves to, and where it was set."""
        names = self.lines.names
        record = names.records.get(name)
        if record is None:
            raise Unknown(f"There is no model name {name!r}.", param="name")
        served = names.table.names[name]
        missing = names.table.missing_behind(served, self.fleet.models_known())
        return {
            "name": name,
            **record.described(),
            "models": {model: round(share, 6) for model, share in served.models},
            "source": "store" if name in names.stored else "settings",
            **({"problem": missing} if missing is not None else {}),
        }

    async def put_name(self, name: str, body: dict[str, Any]) -> None:
        """Writes a name; the other gateways have it an exchange later."""
        try:
            record = read_name(name, body)
            self.lines.names.checked(name, record)
        except ValueError as error:
            raise BadRequest(f"{error}.", param=name) from None
        await self.write(self.records.store.put(MODEL, name, stored_name(record)))

    # adapters
    def described_adapter(self, name: str) -> dict[str, Any]:
        """An adapter, and the workers that have it."""
        if name not in self.lines.adapters.records:
            raise Unknown(f"There is no adapter {name!r}.", param="name")
        return self.lines.adapters.described(name)

    async def put_adapter(self, name: str, body: dict[str, Any]) -> dict[str, str]:
        """Loads an adapter and writes it down; the other gateways have it an exchange later. What each worker that was
        asked to load it said. BadRequest if none of them does."""
        try:
            record = read_adapter(name, body)
        except ValueError as error:
            raise BadRequest(f"{error}.", param=name) from None
        self._check_adapter(name, record)
        adapters = self.lines.adapters
        with adapters.replacing(name, record):
            said = await adapters.loaded_everywhere(name, record)
            if not said:
                raise NoWorker(f"No worker serves {record.model!r} right now to load {name!r}.", retry_after_s=5.0)
            if all(word != LOADED for word in said.values()):
                worker, why = next(iter(said.items()))
                raise BadRequest(f"adapter {name!r}: no worker loads it; {worker} says: {why}.", param=name)
            await self.write(self.records.store.put(ADAPTER, name, orjson.dumps(record.described()).decode()))
        return said

    def _check_adapter(self, name: str, record: AdapterRecord) -> None:
        known = self.fleet.models_known()
        if record.model not in known:
            there = ", ".join(sorted(known)) or "none"
            raise BadRequest(f"adapter {name!r}: no worker serves {record.model!r}; available: {there}.", param="model")
        if name in self.lines.names.records or name in known - self.lines.adapters.listed_by_workers():
            raise Conflict(f"{name!r} is the name of a model already.")
        old = self.lines.adapters.records.get(name)
        if old is not None and old.model != record.model:
            raise Conflict(f"Adapter {name!r} belongs to {old.model!r}: remove it first.")

    async def drop_adapter(self, name: str) -> None:
        """Unloads an adapter everywhere. One of the settings is as they have it again."""
        self.described_adapter(name)
        if name not in self.lines.adapters.stored:
            raise Conflict(f"Adapter {name!r} comes from the settings: remove it there.")
        await self.write(self.records.store.drop(ADAPTER, name))
        if name not in self.lines.adapters.records:
            await self.lines.adapters.unloaded_everywhere(name)

    async def put_worker(self, worker_id: str, body: dict[str, Any]) -> None:
        """A worker of this gateway alone; others join by themselves, through the store."""
        if unknown := sorted(body.keys() - set(WORKER_FIELDS)):
            there_are = f"{', '.join(WORKER_FIELDS[:-1])} and {WORKER_FIELDS[-1]}"
            raise BadRequest(f"A worker has no field '{unknown[0]}'; there are {there_are}.", param=unknown[0])
        try:
            said = registration_from(worker_id, orjson.dumps(body).decode())
            await self.siblings.add(said.worker(worker_id), said.access)
        except ValueError as error:
            raise BadRequest(f"{error}.") from None
        except StoreAway as error:
            raise StoreUnreachable(f"{error}. Nothing is changed.", retry_after_s=5.0) from None
        if worker_id in self.records.drained:  # that was said of one that is gone
            await self.write(self.records.store.drop(DRAINED, worker_id))

    async def drop_worker(self, worker_id: str) -> None:
        """This gateway has a worker no more."""
        try:
            await self.siblings.remove(worker_id)
        except StoreAway as error:
            raise StoreUnreachable(f"{error}. Nothing is changed.", retry_after_s=5.0) from None


async def json_object(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object or nothing at all."""
    body = await request.body()
    try:
        value = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


Body = Annotated[dict[str, Any], Depends(json_object)]


@dataclass(frozen=True, slots=True)
class Page:
    """Which entries of a long list are asked for: `limit` of those whose name contains `search`, behind `after`."""

    search: str = ""
    after: str = ""
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000

    def of(self, names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
        """The names on this page, sorted, and what the answer says beside them: how many match, and what follows."""
        found = sorted(name for name in names if self.search in name)
        start = bisect_right(found, self.after) if self.after else 0
        page = found[start : start + self.limit]
        following = page[-1] if start + self.limit < len(found) else None
        return page, {"total": len(found), "next_after": following}


Paged = Annotated[Page, Depends()]


def admin_routes(admin: Admin) -> APIRouter:
    """Everything under /admin."""
    router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(admin.authorize)])
    router.include_router(_workers(admin))
    router.include_router(_tenants(admin))
    router.include_router(_keys(admin))
    router.include_router(_policy(admin))
    router.include_router(_names(admin))
    router.include_router(_adapters(admin))

    @router.get("/targets", summary="The engines' addresses for Prometheus' HTTP service discovery")
    async def targets() -> Response:
        return JSONResponse([target(member.worker) for member in admin.fleet.members.values()])

    return router


def target(worker: Worker) -> dict[str, Any]:
    """A worker as `http_sd_config` takes it."""
    address = urlsplit(worker.url)
    labels = {"worker": worker.id, "role": worker.role.value}
    if address.scheme != "http":
        labels["__scheme__"] = address.scheme
    if address.path:
        labels["__metrics_path__"] = f"{address.path}/metrics"
    return {"targets": [address.netloc], "labels": labels}


def _workers(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/workers")
    fleet = admin.fleet

    def known(worker_id: str) -> None:
        if worker_id not in fleet.members:
            raise Unknown(f"There is no worker {worker_id!r}.", param="worker_id")

    @router.get("", summary="The workers")
    async def listed(page: Paged) -> Response:
        names, rest = page.of(fleet.members)
        return JSONResponse({"workers": described(fleet.members[name] for name in names)} | rest)

    @router.put("/{worker_id}", summary="Add a worker to this gateway: url, role, slots, key, ca, cert, cert_key")
    async def add(worker_id: str, body: Body) -> Response:
        await admin.put_worker(worker_id, body)
        return JSONResponse(described([fleet.members[worker_id]])[0], 201)

    @router.delete("/{worker_id}", summary="Remove a worker from this gateway; drain it first to lose no answer")
    async def remove(worker_id: str) -> Response:
        known(worker_id)
        await admin.drop_worker(worker_id)
        return Response(status_code=204)

    @router.post("/{worker_id}/drain", summary="Drain a worker: no gateway sends it new requests")
    async def drain(worker_id: str) -> Response:
        known(worker_id)
        await admin.write(admin.records.store.put(DRAINED, worker_id, fleet.members[worker_id].worker.url))
        return JSONResponse(described([fleet.members[worker_id]])[0])

    @router.post("/{worker_id}/resume", summary="Return a drained worker to service")
    async def resume(worker_id: str) -> Response:
        known(worker_id)
        await admin.write(admin.records.store.drop(DRAINED, worker_id))
        return JSONResponse(described([fleet.members[worker_id]])[0])

    return router


def stored_name(record: NameRecord) -> str:
    """A name's record as the store has it."""
    return orjson.dumps(record.described()).decode()


def _names(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/models")

    @router.get("", summary="The names that clients may ask for, what answers to each, and the models that are served")
    async def listed(page: Paged) -> Response:
        names, rest = page.of(admin.lines.names.records)
        told = {"names": [admin.described_name(name) for name in names], "served": sorted(admin.fleet.models_known())}
        return JSONResponse(told | rest)

    @router.get("/{name:path}", summary="One name")
    async def one(name: str) -> Response:
        return JSONResponse(admin.described_name(name))

    @router.put(
        "/{name:path}", summary="Set a name, at every gateway: targets with weights, fallbacks, tenants, sticky"
    )
    async def put(name: str, body: Body) -> Response:
        await admin.put_name(name, body)
        return JSONResponse(admin.described_name(name))

    @router.delete("/{name:path}", summary="Remove a name; one from the settings returns to its configured value")
    async def delete(name: str) -> Response:
        if name not in admin.lines.names.stored:
            admin.described_name(name)
            raise Conflict(f"The model name {name!r} comes from the settings: remove it there.")
        await admin.write(admin.records.store.drop(MODEL, name))
        return Response(status_code=204)

    return router


def _adapters(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/adapters")
    adapters = admin.lines.adapters

    @router.get("", summary="The LoRA adapters, and the workers that have each")
    async def listed(page: Paged) -> Response:
        await adapters.refresh()
        names, rest = page.of(adapters.records)
        return JSONResponse({"adapters": [admin.described_adapter(name) for name in names]} | rest)

    @router.get("/{name:path}", summary="One LoRA adapter")
    async def one(name: str) -> Response:
        await adapters.refresh()
        return JSONResponse(admin.described_adapter(name))

    @router.put("/{name:path}", summary="Load a LoRA adapter at the workers of its model: model, path, tenants, pinned")
    async def put(name: str, body: Body) -> Response:
        asked = await admin.put_adapter(name, body)
        return JSONResponse(admin.described_adapter(name) | {"asked": asked})

    @router.delete("/{name:path}", summary="Unload a LoRA adapter everywhere, and forget it")
    async def delete(name: str) -> Response:
        await admin.drop_adapter(name)
        return Response(status_code=204)

    return router


def _tenants(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/tenants")

    @router.get("", summary="The tenants, their limits and what they used; never a key")
    async def listed(page: Paged) -> Response:
        names, rest = page.of(record.name for record in admin.tenants.all())
        shown = [_plain(admin.described_tenant(admin.tenant(name))) for name in names]
        return JSONResponse({"tenants": shown} | rest)

    @router.get("/{name}", summary="One tenant")
    async def one(name: str) -> Response:
        return JSONResponse(_plain(admin.described_tenant(admin.tenant(name))))

    @router.put(
        "/{name}",
        summary="Create or replace a tenant, in the form of the tenant file; without `keys` it keeps its keys",
    )
    async def put(name: str, body: Body) -> Response:
        if body.setdefault("name", name) != name:
            raise BadRequest(f"The body names {body['name']!r}, the path {name!r}.", param="name")
        try:
            record = read_record(body)
        except ValueError as error:
            raise BadRequest(f"{error}.") from None
        if "keys" not in body and admin.tenants.record(name) is not None:
            record = replace(record, keys=admin.tenant(name).keys)
        await admin.put_tenant(record)
        return JSONResponse(_plain(admin.described_tenant(admin.tenant(name))))

    @router.delete("/{name}", summary="Delete a tenant: its keys stop working")
    async def delete(name: str) -> Response:
        await admin.drop_tenant(name)
        return Response(status_code=204)

    return router


def _keys(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/tenants/{name}/keys")

    @router.post(
        "", summary="Create a key, shown only once; `retire_others_in_s` expires the older ones after that time"
    )
    async def make(name: str, body: Body) -> Response:
        record, key = admin.tenant(name), new_key()
        keys = record.credentials
        if (retire_s := body.get("retire_others_in_s")) is not None:
            keys = _retired(keys, retire_s, admin.wall())
        fresh = KeyRecord(hashed(key))
        await admin.put_tenant(replace(record, keys=(*keys, fresh)))
        return JSONResponse({"key": key, "id": key_id(fresh.key)}, 201, {"cache-control": "no-store"})

    @router.delete("/{id}", summary="Delete a key")
    async def delete(name: str, id: str) -> Response:
        record = admin.tenant(name)
        kept = tuple(key for key in record.credentials if key_id(key.key) != id)
        if len(kept) == len(record.credentials):
            raise Unknown(f"Tenant {name!r} has no key {id!r}.", param="id")
        await admin.put_tenant(replace(record, keys=kept))
        return Response(status_code=204)

    return router


def _policy(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/policy")

    def told() -> Response:
        waiting = dict(admin.lines.depth())
        return JSONResponse({"policy": admin.policy.name, "options": admin.policy.options, "waiting": waiting})

    @router.get("", summary="The policy in force")
    async def current() -> Response:
        return told()

    @router.put("", summary="Change the policy of all lines, at every gateway: policy, options")
    async def switch(body: Body) -> Response:
        try:
            record = msgspec.convert(body, PolicyRecord)
            build(record.policy, record.options)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadRequest(f"{error}.", param="policy") from None
        await admin.write(admin.records.store.put(POLICY, LIVE, msgspec.json.encode(record).decode()))
        return told()

    @router.delete("", summary="Return to the policy that each gateway was started with")
    async def back() -> Response:
        await admin.write(admin.records.store.drop(POLICY, LIVE))
        return told()

    return router


def _retired(keys: tuple[KeyRecord, ...], after_s: Any, wall: float) -> tuple[KeyRecord, ...]:
    if isinstance(after_s, bool) or not isinstance(after_s, int | float) or not 0 <= after_s <= 366 * 86400:
        raise BadRequest(
            "'retire_others_in_s' must be a number of seconds, at most one year.", param="retire_others_in_s"
        )
    end = datetime.fromtimestamp(wall, UTC) + timedelta(seconds=after_s)
    return tuple(
        key if key.expires is not None and key.expires.astimezone(UTC) < end else replace(key, expires=end)
        for key in keys
    )


def _plain(value: dict[str, Any]) -> Any:
    return orjson.loads(orjson.dumps(value))
