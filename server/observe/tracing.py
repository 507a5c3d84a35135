"""One trace per request, over OTLP: the gateway's part of it, and the engines' own as its children.

Names follow OpenTelemetry's semantic conventions for generative AI. A request's phases become spans when it has ended,
from the times that its ticket has anyway; only the root span is begun before, for its id travels to the engines.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.observe.observer import Asked, Observer
from server.request.call import Phase, Ticket

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_CONTEXT = TraceContextTextMapPropagator()


class TracedLeg(NamedTuple):
    """A phase of a request: its times on the gateway's clock, and whose it was."""

    name: str
    begin_s: float
    end_s: float
    worker: str


class Tracing(Observer):
    """Begins and ends the traces of one process.

    service: this gateway's name. pseudonym: of a tenant. share: of the requests that no caller has decided about.
    """

    def __init__(self, service: str, pseudonym: Callable[[str], str], share: float) -> None:
        resource = Resource.create({"service.name": "evenhand-gateway", "service.instance.id": service})
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(share)))
        self._tracer: Tracer = self._provider.get_tracer("evenhand")
        self._pseudonym = pseudonym
        self._roots: dict[Ticket, Span] = {}
        self._epoch_s = 0.0

    def start(self, endpoint: str, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        """From here on spans are sent; a thread of its own does it, and drops what a slow collector does not take.

        clock: of the tickets' times. wall: seconds since 1970.
        """
        self._epoch_s = wall() - clock()
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def stop(self) -> None:
        """Sends what is left, and blocks for that."""
        self._provider.shutdown()

    def began(self, ticket: Ticket, asked: Asked) -> None:
        """The request's root span, within the client's trace if it names one."""
        traceparent = asked.headers.get(b"traceparent")
        told = {} if traceparent is None else {"traceparent": traceparent.decode("latin-1")}
        operation = OPERATIONS.get(ticket.call.route.path, "tokenize")
        span = self._tracer.start_span(
            f"{operation} {ticket.call.asked or ticket.call.model}",
            context=_CONTEXT.extract(told),
            kind=SpanKind.SERVER,
            start_time=self._ns(ticket.job.arrived_at),
        )
        carrier: dict[str, str] = {}
        _CONTEXT.inject(carrier, context=set_span_in_context(span))
        ticket.trace = b"".join(f"{name}: {value}\r\n".encode() for name, value in carrier.items())
        self._roots[ticket] = span

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """The request is over: its phases become spans."""
        span = self._roots.pop(ticket, None)
        if span is None:
            return
        end_s = ticket.times[ticket.phase] or ticket.clock()
        if span.is_recording():
            self._describe(span, ticket, outcome)
            for leg in legs(ticket, end_s):
                child = self._tracer.start_span(
                    leg.name,
                    context=set_span_in_context(span),
                    start_time=self._ns(leg.begin_s),
                    attributes={"evenhand.worker": leg.worker} if leg.worker else {},
                )
                child.end(self._ns(leg.end_s))
        span.end(self._ns(end_s))

    def _describe(self, span: Span, ticket: Ticket, outcome: str) -> None:
        call = ticket.call
        span.set_attributes(
            {
                "gen_ai.operation.name": OPERATIONS.get(call.route.path, "tokenize"),
                "gen_ai.request.model": call.asked or call.model,
                "gen_ai.response.model": call.model,
                "gen_ai.request.max_tokens": call.max_tokens,
                "gen_ai.usage.input_tokens": ticket.prompt_tokens,
                "gen_ai.usage.output_tokens": ticket.tokens,
                "http.route": call.route.path,
                "evenhand.request_id": call.id,
                "evenhand.tenant": self._pseudonym(call.tenant.name),
                "evenhand.outcome": outcome,
            }
        )
        if outcome not in ("ok", "cancelled"):
            span.set_attribute("error.type", outcome)
            span.set_status(StatusCode.ERROR)

    def _ns(self, at_s: float) -> int:
        return int((self._epoch_s + at_s) * 1e9)


def legs(ticket: Ticket, end_s: float) -> Iterator[TracedLeg]:
    """The phases that a request went through, in order."""
    arrived_s = ticket.job.arrived_at
    sent_s, first_s = ticket.times[Phase.PREFILLING], ticket.times[Phase.DECODING]
    yield TracedLeg("wait in line", arrived_s, end_s if sent_s is None else sent_s, "")
    if sent_s is None:
        return
    read_s = None if ticket.split is None else ticket.split.read_at
    if ticket.split is not None and read_s is not None:
        yield TracedLeg("prefill", sent_s, read_s, ticket.split.prefill.worker.id)
        yield TracedLeg("kv transfer", read_s, end_s if first_s is None else first_s, ticket.worker)
    else:
        yield TracedLeg("prefill", sent_s, end_s if first_s is None else first_s, ticket.worker)
    if first_s is not None:
        yield TracedLeg("decode", first_s, end_s, ticket.worker)
