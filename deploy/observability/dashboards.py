"""The Grafana dashboards, made from one table of panels: `make dashboards` writes them into
grafana/dashboards beside this file.

A query is about what gateway, plug-in and vLLM export, or about a recording rule of prometheus/rules.yml.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)

FOLDER = Path(__file__).resolve().parent / "grafana" / "dashboards"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
OF_GATEWAYS = '{job=~".*evenhand-gateway"}'
WIDTH = 24
HEIGHT = 8
STAT_HEIGHT = 4


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the name of its lines; {{label}} takes a label's value."""

    expr: str
    name: str


@dataclass(frozen=True, slots=True)
class DashboardPanel:
    """One panel. unit: Grafana's name of it. text: what a reader should know. number: one figure in place of lines."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    stacked: bool = False
    number: bool = False


@dataclass(frozen=True, slots=True)
class PanelRow:
    """Panels side by side, as wide as each other."""

    title: str
    panels: tuple[DashboardPanel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. uid: part of its address, so it must not change."""

    uid: str
    title: str
    text: str
    rows: tuple[PanelRow, ...]


def rate(metric: str, by: str = "") -> str:
    """A counter's rate, summed over everything but `by`."""
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def quantiles(histogram: str, *shares: float) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket[$__rate_interval])))", f"{share:.0%}")
        for share in shares
    )


def latency(title: str, name: str, text: str) -> DashboardPanel:
    return DashboardPanel(title, "s", quantiles(f"evenhand_request_{name}_seconds", 0.5, 0.95, 0.99), text)


def figure(title: str, unit: str, expr: str, text: str = "") -> DashboardPanel:
    return DashboardPanel(title, unit, (Query(expr, title),), text, number=True)


TTFT = latency(
    "Time to first token", "ttft", "Arrival to the first bytes of the answer, waiting included; streams only."
)
SECOND = latency("To the second token", "second_token", "From the first token of a streamed answer to its second.")
ITL = latency("Gap between tokens", "itl", "Between two streamed chunks of one answer.")
QUEUE = DashboardPanel(
    "Waiting line", "short", (Query("sum by (model) (evenhand_queue_depth)", "{{model}}"),), "At the gateways."
)

OVERVIEW = Board(
    "evenhand-overview",
    "Evenhand / Overview",
    "Are requests served, and how fast?",
    (
        PanelRow(
            "Now",
            (
                figure("Requests", "reqps", rate("evenhand_requests_total")),
                figure("Output tokens", "short", rate('evenhand_tokens_total{kind="completion"}'), "per second"),
                figure("Waiting", "short", "sum(evenhand_queue_depth)"),
                figure("Workers ready", "short", "count(max by (worker) (evenhand_worker_up) == 1) or vector(0)"),
                figure("First token, median", "s", quantiles("evenhand_request_ttft_seconds", 0.5)[0].expr),
                figure("Missed first-token objective", "percentunit", "evenhand:ttft_misses:ratio5m", "last 5 minutes"),
            ),
        ),
        PanelRow("Latency", (TTFT, ITL)),
        PanelRow(
            "More latency",
            (
                latency("Time per output token", "tpot", "(E2E − TTFT) ÷ (output tokens − 1); streams only."),
                latency("Whole answer", "e2e", "Arrival to the end of the answer."),
            ),
        ),
        PanelRow(
            "Traffic",
            (
                DashboardPanel(
                    "Requests by how they ended",
                    "reqps",
                    (Query(rate("evenhand_requests_total", "outcome"), "{{outcome}}"),),
                    "ok, cancelled (the client left), or the error's code.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Tokens",
                    "short",
                    (Query(rate("evenhand_tokens_total", "kind"), "{{kind}}"),),
                    "Per second, of finished requests. `cached` is a part of `prompt`.",
                ),
            ),
        ),
        PanelRow(
            "Objectives",
            (
                QUEUE,
                DashboardPanel(
                    "Streams that missed their objective",
                    "percentunit",
                    (
                        Query("evenhand:ttft_misses:ratio5m", "first token, 5 min"),
                        Query("evenhand:ttft_misses:ratio1h", "first token, 1 h"),
                        Query("evenhand:tpot_misses:ratio5m", "time per token, 5 min"),
                        Query("evenhand:tpot_misses:ratio1h", "time per token, 1 h"),
                    ),
                    "1 % is what the objective allows.",
                ),
            ),
        ),
    ),
)

TENANTS = Board(
    "evenhand-tenants",
    "Evenhand / Tenants and fairness",
    "Who gets how much, and is it fair? Service is weighted tokens: a prompt token 1, an output token 2.",
    (
        PanelRow(
            "Service",
            (
                DashboardPanel(
                    "Service by tenant",
                    "short",
                    (Query(rate("evenhand_tenant_service_total", "tenant"), "{{tenant}}"),),
                    "Weighted tokens per second. The largest tenants are named, the rest is `other`.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Share of service",
                    "percentunit",
                    (Query("evenhand:tenant_service:share5m", "{{tenant}}"),),
                    "Of the last five minutes.",
                    stacked=True,
                ),
            ),
        ),
        PanelRow(
            "Cost",
            (
                DashboardPanel(
                    "GPU time by tenant",
                    "short",
                    (Query(rate("evenhand_tenant_gpu_seconds_total", "tenant"), "{{tenant}}"),),
                    "GPU-seconds per second: GPUs kept busy. An estimate; counted where `cost.meter` is set.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Cost by tenant",
                    "short",
                    (Query(f"3600 * {rate('evenhand_tenant_cost_total', 'tenant')}", "{{tenant}}"),),
                    "Per hour, in the currency of the prices.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Requests by model name",
                    "short",
                    (Query(rate("evenhand_model_requests_total", "name, model"), "{{name}} ({{model}})"),),
                    "Per second, by requested name and answering model.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Fallbacks",
                    "short",
                    (Query(rate("evenhand_fallbacks_total", "model, fallback"), "{{model}} → {{fallback}}"),),
                    "Requests per second that fell back to another model.",
                ),
            ),
        ),
        PanelRow(
            "Fairness",
            (
                DashboardPanel(
                    "Fairness gap",
                    "short",
                    (Query("max by (instance) (evenhand_fairness_max_service_gap)", "{{instance}}"),),
                    "Weighted tokens per weight between the most and the least served of the tenants that wait. "
                    "Bounded under VTC; under the others it shows what the policy costs.",
                ),
                DashboardPanel(
                    "Refused at a limit",
                    "reqps",
                    (Query(rate("evenhand_limit_refusals_total", "reason"), "{{reason}}"),),
                    "A tenant's own limits; nobody else is affected.",
                ),
            ),
        ),
        PanelRow(
            "Waiting",
            (QUEUE, latency("Wait in line", "queue", "Until a worker had room.")),
        ),
    ),
)

POLICIES = Board(
    "evenhand-policies",
    "Evenhand / Policies and preemption",
    "What the scheduler plug-in decides inside the engines.",
    (
        PanelRow(
            "Inside the engines",
            (
                DashboardPanel(
                    "Waiting by lane",
                    "short",
                    (Query("sum by (lane) (evenhand_engine_waiting)", "{{lane}}"),),
                    "Lanes are the policy's: levels under MLFQ, ages under Gittins, one under FCFS.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Preemptions",
                    "short",
                    (Query(rate("evenhand_engine_preemptions_total", "policy, reason"), "{{policy}}: {{reason}}"),),
                    "Per second. `policy`: for a waiting request; `memory`: the KV cache was full; `reset`: ordered.",
                ),
            ),
        ),
        PanelRow(
            "Costs",
            (
                DashboardPanel(
                    "Longest stall",
                    "s",
                    (Query("max by (worker) (evenhand_engine_longest_stall_seconds)", "{{worker}}"),),
                    "Longest time that a started request went without its slot.",
                ),
                DashboardPanel(
                    "Fairness gap in the engines",
                    "short",
                    (Query("max by (worker) (evenhand_engine_service_gap)", "{{worker}}"),),
                    "Among the tenants that wait in that engine.",
                ),
            ),
        ),
        PanelRow(
            "In force",
            (
                DashboardPanel(
                    "Engines by policy",
                    "short",
                    (Query("sum by (policy) (evenhand_engine_policy_info)", "{{policy}}"),),
                    "More than one name for longer than a second or so: an engine refused the change.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Changes of policy",
                    "short",
                    (Query("sum by (outcome) (evenhand_engine_policy_switches_total)", "{{outcome}}"),),
                    "Since the engines' start.",
                ),
            ),
        ),
    ),
)

APART = Board(
    "evenhand-apart",
    "Evenhand / Prefill and decode",
    "Prompts prefilled by one worker and answered by another: which requests are split, and does the KV cache arrive?",
    (
        PanelRow(
            "Where requests go",
            (
                DashboardPanel(
                    "Placements",
                    "reqps",
                    (Query(rate("evenhand_placements_total", "placement"), "{{placement}}"),),
                    "`apart`, or why one worker took a request whole. Empty as long as there is no prefill worker.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Work ahead by role",
                    "short",
                    (Query("sum by (role) (evenhand_worker_pending_tokens)", "{{role}}"),),
                    "Tokens that the workers of a role have yet to compute for the gateways.",
                ),
            ),
        ),
        PanelRow(
            "Reading",
            (
                DashboardPanel(
                    "Prompts at prefill workers",
                    "reqps",
                    (Query(rate("evenhand_prefills_total", "outcome"), "{{outcome}}"),),
                    "All but `read` were prefilled again by the worker that answers.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Time to read a prompt",
                    "s",
                    quantiles("evenhand_prefill_seconds", 0.5, 0.95, 0.99),
                    "At a prefill worker, waiting included.",
                ),
            ),
        ),
        PanelRow("What clients feel", (TTFT, SECOND)),
        PanelRow(
            "KV transfer",
            (
                DashboardPanel(
                    "From read to first bytes",
                    "s",
                    quantiles("evenhand_kv_transfer_seconds", 0.5, 0.95, 0.99),
                    "The fetch of the KV and the first token, of streamed answers.",
                ),
                DashboardPanel(
                    "KV fetched",
                    "Bps",
                    (Query(rate("evenhand_kv_transfer_bytes_total", "worker"), "{{worker}}"),),
                    "By the worker that fetched it.",
                ),
            ),
        ),
    ),
)


def beside_flex(histogram: str, share: float) -> tuple[Query, Query]:
    """A latency's quantile while flex requests run, and while none does."""
    late = f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket[$__rate_interval])))"
    running = "evenhand:flex_in_flight:sum[$__rate_interval]"
    return (
        Query(f"{late} and on () min_over_time({running}) > 0", f"{share:.0%} with flex"),
        Query(f"{late} and on () max_over_time({running}) == 0", f"{share:.0%} without"),
    )


BATCH = Board(
    "evenhand-batch",
    "Evenhand / Tiers and batches",
    "How much of the slack do flex requests and batches use, and do the others notice?",
    (
        PanelRow(
            "Slack",
            (
                DashboardPanel(
                    "Slack used",
                    "percentunit",
                    (Query("evenhand:slack_used:ratio", "slack used"),),
                    "Share of the slots left by other tiers in which flex requests run.",
                ),
                DashboardPanel(
                    "Output tokens by tier",
                    "short",
                    (Query(rate('evenhand_tier_tokens_total{kind="completion"}', "tier"), "{{tier}}"),),
                    "Per second, of finished requests. `flex` has the lines of batches.",
                    stacked=True,
                ),
            ),
        ),
        PanelRow(
            "What others feel",
            (
                DashboardPanel(
                    "Time to first token",
                    "s",
                    beside_flex("evenhand_request_ttft_seconds", 0.99),
                    "Of `default` and `priority`, while flex requests run beside them and while none does.",
                ),
                DashboardPanel(
                    "Gap between tokens",
                    "s",
                    beside_flex("evenhand_request_itl_seconds", 0.99),
                    "Of `default` and `priority`, while flex requests run beside them and while none does.",
                ),
            ),
        ),
        PanelRow(
            "What flex pays",
            (
                DashboardPanel(
                    "Displaced flex tokens",
                    "short",
                    (
                        Query(rate("evenhand_engine_flex_tokens_total"), "computed"),
                        Query(rate("evenhand_engine_flex_displaced_tokens_total"), "displaced"),
                        Query(rate("evenhand_engine_flex_recomputed_tokens_total"), "computed again"),
                    ),
                    "Per second. Of what a displaced request had computed, the part that has left the prefix cache "
                    "when it goes on is computed again.",
                ),
                DashboardPanel(
                    "Wait of flex requests",
                    "s",
                    quantiles("evenhand_flex_queue_seconds", 0.5, 0.95, 0.99),
                    "At the gateways, until they started.",
                ),
            ),
        ),
        PanelRow(
            "Batches",
            (
                DashboardPanel(
                    "Requests of batches",
                    "reqps",
                    (Query(rate("evenhand_batch_lines_total", "outcome"), "{{outcome}}"),),
                    "`retried`: found no room, or an engine failed on it, and is tried again.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Batches",
                    "short",
                    (
                        Query("max(evenhand_batches_running)", "running"),
                        Query("max(evenhand_batches_late)", "will miss their window"),
                    ),
                    "A batch is late if, at the pace of the last ten minutes, its window ends first.",
                ),
            ),
        ),
    ),
)

WORKERS = Board(
    "evenhand-workers",
    "Evenhand / Workers and KV cache",
    "How loaded is each engine?",
    (
        PanelRow(
            "Fleet",
            (
                DashboardPanel(
                    "Takes requests",
                    "short",
                    (Query("max by (worker, role) (evenhand_worker_up)", "{{worker}} ({{role}})"),),
                    "1 if any gateway reaches it and it is not drained.",
                ),
                DashboardPanel(
                    "In flight",
                    "short",
                    (Query("sum by (worker) (evenhand_worker_in_flight)", "{{worker}}"),),
                    "Sequences in flight from the gateways.",
                ),
            ),
        ),
        PanelRow(
            "Inside",
            (
                DashboardPanel(
                    "Batch and line",
                    "short",
                    (
                        Query("sum by (worker) (vllm:num_requests_running)", "{{worker}} running"),
                        Query("sum by (worker) (vllm:num_requests_waiting)", "{{worker}} waiting"),
                    ),
                    "As vLLM counts them.",
                ),
                DashboardPanel(
                    "KV cache in use",
                    "percentunit",
                    (Query("max by (worker) (vllm:kv_cache_usage_perc)", "{{worker}}"),),
                ),
            ),
        ),
        PanelRow(
            "Work",
            (
                DashboardPanel(
                    "Prompt tokens computed",
                    "short",
                    (Query(rate("vllm:prompt_tokens_total", "worker, role"), "{{worker}} ({{role}})"),),
                    "Per second.",
                ),
                DashboardPanel(
                    "Tokens made",
                    "short",
                    (Query(rate("vllm:generation_tokens_total", "worker, role"), "{{worker}} ({{role}})"),),
                    "Per second.",
                ),
            ),
        ),
        PanelRow(
            "Cache",
            (
                DashboardPanel(
                    "Prefix cache hits",
                    "percentunit",
                    (
                        Query(
                            f"{rate('vllm:prefix_cache_hits_total', 'worker')} / "
                            f"{rate('vllm:prefix_cache_queries_total', 'worker')}",
                            "{{worker}}",
                        ),
                    ),
                    "Of the prompt tokens looked up.",
                ),
                DashboardPanel(
                    "Preemptions",
                    "short",
                    (Query(rate("vllm:num_preemptions_total", "worker"), "{{worker}}"),),
                    "Per second, whatever the reason.",
                ),
            ),
        ),
    ),
)

GATEWAY = Board(
    "evenhand-gateway",
    "Evenhand / Gateway",
    "The gateway processes themselves.",
    (
        PanelRow(
            "Process",
            (
                DashboardPanel(
                    "CPU",
                    "percentunit",
                    (Query(rate(f"process_cpu_seconds_total{OF_GATEWAYS}", "instance"), "{{instance}}"),),
                    "Of one core: a gateway uses one.",
                ),
                DashboardPanel(
                    "Memory",
                    "bytes",
                    (Query(f"process_resident_memory_bytes{OF_GATEWAYS}", "{{instance}}"),),
                ),
            ),
        ),
        PanelRow(
            "Work",
            (
                latency("Wait in line", "queue", "Until a worker had room."),
                DashboardPanel(
                    "Requests by route",
                    "reqps",
                    (Query(rate("evenhand_requests_total", "route"), "{{route}}"),),
                    "An empty route stands for bytes that are not a valid request.",
                    stacked=True,
                ),
            ),
        ),
        PanelRow(
            "Shared state",
            (
                DashboardPanel(
                    "Redis answers",
                    "short",
                    (Query("evenhand_store_up", "{{instance}}"),),
                    "Also 1 where no store is used.",
                ),
                DashboardPanel(
                    "Gateways that see each other",
                    "short",
                    (Query("evenhand_replicas", "{{instance}}"),),
                    "If fewer than are running, the others do not share limits and fairness.",
                ),
            ),
        ),
        PanelRow(
            "Connections",
            (
                DashboardPanel(
                    "Open files",
                    "short",
                    (Query(f"process_open_fds{OF_GATEWAYS}", "{{instance}}"),),
                    "About two for each request in flight.",
                ),
                DashboardPanel(
                    "Answers that workers did not finish",
                    "short",
                    (Query(rate("evenhand_failovers_total", "outcome"), "{{outcome}}"),),
                    "Per second. `retried` and `resumed`: another worker took over and no client noticed.",
                    stacked=True,
                ),
                DashboardPanel(
                    "Failed or refused",
                    "reqps",
                    (Query(rate('evenhand_requests_total{outcome!~"ok|cancelled"}', "outcome"), "{{outcome}}"),),
                    "Empty as long as nothing has failed.",
                ),
            ),
        ),
    ),
)

BOARDS: Mapping[str, Board] = {
    board.uid.removeprefix("evenhand-"): board
    for board in (OVERVIEW, TENANTS, POLICIES, BATCH, APART, WORKERS, GATEWAY)
}


def built(board: Board) -> str:
    """The dashboard as Grafana reads it."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["evenhand"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(
            dashboard.DashboardLink("Evenhand")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["evenhand"])
            .as_dropdown(True)
        )
    )
    ids = count(1)
    for row in board.rows:
        made.with_row(dashboard.Row(row.title).id(next(ids)))
        for panel in row.panels:
            made.with_panel(_panel(panel, WIDTH // len(row.panels)).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _panel(panel: DashboardPanel, width: int) -> stat.Panel | timeseries.Panel:
    made = stat.Panel().height(STAT_HEIGHT) if panel.number else _lines(panel)
    made.title(panel.title).description(panel.text).unit(panel.unit).span(width).datasource(SOURCE)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.name)
        made.with_target(target.datasource(SOURCE))
    return made


def _lines(panel: DashboardPanel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .height(HEIGHT)
        .min(0)
        .draw_style(GraphDrawStyle.LINE)
        .line_width(1.5)
        .fill_opacity(25 if panel.stacked else 5)
        .show_points(VisibilityMode.NEVER)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    return made.stacking(StackingConfig().mode(StackingMode.NORMAL)) if panel.stacked else made


def panels(board: Board) -> Sequence[DashboardPanel]:
    """All panels of a dashboard."""
    return [panel for row in board.rows for panel in row.panels]


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, board in BOARDS.items():
        (FOLDER / f"{name}.json").write_text(built(board), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
