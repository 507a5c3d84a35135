"""The metrics that the plug-in exports, and the thread that reads energy and GPU meters for them."""

import threading
import time
from functools import cache
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from scheduler.energy import Meters

REPORT_INTERVAL_S: Final = 1.0


class EngineMetrics:
    """What the plug-in exports. vLLM's API server shows it if PROMETHEUS_MULTIPROC_DIR was set before the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._for_requests()
        self._for_tenants()
        self._for_flex()
        self._for_hardware()

    def _for_requests(self) -> None:
        self.policy = self._gauge("policy_info", "1 for the policy in force", ("policy",), "livemax")
        self.switches = self._counter(
            "policy_switches_total", "Orders to change the policy: done or refused", ("outcome",)
        )
        self.preemptions = self._counter(
            "preemptions_total",
            "Running requests stopped: for a waiting one (policy), for KV memory (memory), by order (reset)",
            ("policy", "reason"),
        )
        self.waiting = self._gauge("waiting", "Requests in line, by lane", ("lane",), "livesum")
        self.completion_s = self._gauge(
            "mean_completion_seconds",
            "Arrival to end of the latest requests: as they went (policy), and first come, first served (fcfs)",
            ("of",),
            "livemax",
        )
        self.promised_s = self._gauge(
            "promised_wait_seconds", "Longest wait for a first token that `tail` allows now", (), "livemax"
        )
        self.stall_s = self._gauge(
            "longest_stall_seconds", "Longest that a started request went without its slot", (), "livemax"
        )
        self.slots = self._gauge("slots", "Requests that run at once, all ranks together", (), "livesum")
        self.steps = self._counter("steps_total", "Scheduling passes, counted once a second", ())
        self.step_tokens = self._gauge("step_tokens", "Tokens that a step computes at most", (), "livemax")
        self.adapters = self._gauge("adapters", "LoRA adapters that it keeps, 0 without LoRA", (), "livemax")

    def _for_tenants(self) -> None:
        self.service = self._counter(
            "tenant_service_total",
            "Service in weighted tokens (prompt computed 1, output 2); tenants beyond the largest are 'other'",
            ("tenant",),
        )
        self.gap = self._gauge(
            "service_gap", "Weighted tokens between the most and least served waiting tenant", (), "livemax"
        )

    def _for_flex(self) -> None:
        self.flex_tokens = self._counter("flex_tokens_total", "Tokens of flex requests that steps computed", ())
        self.flex_displaced = self._counter(
            "flex_displaced_tokens_total", "Tokens that flex requests had in the KV cache when displaced", ()
        )
        self.flex_recomputed = self._counter(
            "flex_recomputed_tokens_total", "Of those, tokens that they had to compute again", ()
        )

    def _for_hardware(self) -> None:
        self.info = self._gauge("info", "1, with the number format of the weights", ("dtype",), "livemax")
        self.compression = self._gauge(
            "weight_compression", "16 bits over the bits that a parameter takes", (), "livemax"
        )
        self.energy = self._gauge("energy_joules", "Energy, by device, since its own start", ("device",), "livemax")
        self.gpu_use = self._gauge("gpu_use", "Share of time in which a GPU computed", ("device",), "livemax")

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"evenhand_engine_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...], mode: Any) -> Gauge:  # noqa: ANN401
        return Gauge(f"evenhand_engine_{name}", text, labels, registry=self._registry, multiprocess_mode=mode)


@cache
def engine_metrics(registry: CollectorRegistry) -> EngineMetrics:
    """The metrics of a registry: it takes each name once, and one process may build several schedulers."""
    return EngineMetrics(registry)


def watch_meters(found: Meters, metrics: EngineMetrics) -> None:
    """Keeps energy and GPU use up to date in a thread: an engine that idles takes no steps in which to read them."""
    if not (found.zones or found.gpus):
        return

    def watch() -> None:
        while True:
            for device, joules in found.joules().items():
                metrics.energy.labels(device).set(joules)
            for device, share in found.use().items():
                metrics.gpu_use.labels(device).set(share)
            time.sleep(REPORT_INTERVAL_S)

    threading.Thread(target=watch, name="evenhand meters", daemon=True).start()
