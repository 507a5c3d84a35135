"""How a batch's lines run: as requests of the gateway that have no socket, in the room that others leave."""

from collections.abc import Awaitable, Callable, Mapping

from server.admission.dispatch import FlexRules, Lines
from server.batch.content import Reply
from server.engine.client import EngineConnection
from server.request.call import Route
from server.request.directory import Tenants
from server.request.errors import NoWorker, ServiceError, UnknownKey, error_object, status_of
from server.request.schemas import ROUTES, splice
from server.request.tenants import OPEN, Tenant

LINES_AHEAD = 32  # of a batch, that wait for a place in the gateway
FLEX = b'"service_tier":"flex"'  # whatever the line itself asks for


class LineRequest:
    """A request of the gateway whose answer is collected instead of sent."""

    def __init__(self, route: Route, body: bytes, tenant: Tenant, request_id: str) -> None:
        self.route = route
        self.received: bytes | bytearray = body
        self.tenant = tenant
        self.request_id = request_id
        self.headers: Mapping[bytes, bytes] = {}
        self.extra_headers = b""
        self.client = ""
        self.begun = False
        self.status = 0
        self.data = bytearray()
        self.retry_after_s: float | None = None

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        self.begun = True
        self.status = status

    def write(self, data: bytes) -> None:
        self.data += data

    def forward(self, chunk: bytes, at: int) -> None:
        self.data += chunk[at:-2]

    def end(self) -> None:
        """The answer is complete."""

    def flows_from(self, connection: EngineConnection | None) -> None:
        """Nothing here is ever too slow for an engine."""

    def fail(self, error: ServiceError) -> None:
        """The request ends with an error, which replaces what had been collected."""
        self.status = status_of(error)
        self.retry_after_s = error.retry_after_s
        self.data = bytearray(error_object(error))


class GatewayEngines:
    """`runner.Engines` over this gateway. flex: how it lets flex requests in, for lines are such requests."""

    def __init__(
        self, answer: Callable[[LineRequest], Awaitable[None]], tenants: Tenants, lines: Lines, flex: FlexRules
    ) -> None:
        self.answer = answer
        self.tenants = tenants
        self.lines = lines
        self.flex = flex

    def _tenant(self, name: str) -> Tenant | None:
        return OPEN if self.tenants.open and name == OPEN.name else self.tenants.named(name)

    def served(self, tenant: str, model: str) -> bool:
        who = self._tenant(tenant)
        if who is None or (who.models is not None and model not in who.models):
            return False
        if not self.lines.fleet.serves():
            return True  # lines wait for a worker
        return self.lines.names.answers_to(model, who)

    def room(self, model: str, running: int) -> int:
        """As many as workers may be given, and some that wait in line, where policy and reserve see them."""
        named = self.lines.names.table.models_of(model)
        behind = {self.lines.adapters.base_of(name) or name for name in named}
        loads = [load for name in behind for pool in self.lines.fleet.pools.of(name) for load in pool.workers.values()]
        if not loads:
            return 0
        return sum(self.flex.capacity(load.worker) for load in loads) + LINES_AHEAD - running

    async def ask(self, tenant: str, endpoint: str, body: bytes, request_id: str) -> Reply:
        who = self._tenant(tenant)
        if who is None:
            unknown = UnknownKey("The tenant of this batch is not known here any more.")
            return Reply(status_of(unknown), error_object(unknown), request_id)
        request = LineRequest(ROUTES[endpoint.encode()], splice(body, FLEX), who, request_id)
        await self.answer(request)
        if not request.status:
            request.fail(NoWorker("The gateway is stopping.", retry_after_s=1.0))
        return Reply(request.status, bytes(request.data), request_id, request.retry_after_s)
