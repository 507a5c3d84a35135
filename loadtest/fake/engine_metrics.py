"""A fake engine's /metrics under vLLM's names, so that whatever reads vLLM reads it."""

from collections.abc import Iterator

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from loadtest.simulator.batch import ContinuousBatch

_LABELS = ("model_name", "engine")
# vLLM's finished_reason for our outcomes.
_REASONS = {"done": "stop", "length": "length", "aborted": "abort", "failed": "error"}


class _Snapshot(Collector):
    """Reads the batch when asked: nothing is counted twice, and a token costs no metric."""

    def __init__(self, batch: ContinuousBatch, model: str, plugin: bool) -> None:
        self._batch = batch
        self._plugin = plugin
        self._labels = (model, "0")

    def collect(self) -> Iterator[Metric]:
        batch, counts = self._batch, self._batch.counts
        gauges = {
            "vllm:num_requests_running": ("Number of requests in model execution batches.", batch.running()),
            "vllm:num_requests_waiting": ("Number of requests waiting to be processed.", batch.waiting()),
            "vllm:kv_cache_usage_perc": ("KV-cache usage. 1 means 100 percent usage.", batch.kv_usage()),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        counters = {
            "vllm:prompt_tokens": ("Number of prefill tokens processed.", counts.prompt_tokens),
            "vllm:generation_tokens": ("Number of generation tokens processed.", counts.generation_tokens),
            "vllm:prefix_cache_queries": ("Prefix cache queries, in number of tokens.", counts.prefix_queries),
            "vllm:prefix_cache_hits": ("Prefix cache hits, in number of cached tokens.", counts.prefix_hits),
            "vllm:num_preemptions": ("Cumulative number of preemption from the engine.", counts.preemptions),
        }
        for name, (text, total) in counters.items():
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, total)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success", "Count of successfully processed requests.", labels=(*_LABELS, "finished_reason")
        )
        for outcome, reason in _REASONS.items():
            success.add_metric((*self._labels, reason), counts.finished.get(outcome, 0))
        yield success
        if self._plugin:
            yield from self._of_plugin()

    def _of_plugin(self) -> Iterator[Metric]:
        """What our plug-in inside vLLM shows, as far as there is such a thing here."""
        batch, counts = self._batch, self._batch.counts
        policy = GaugeMetricFamily("evenhand_engine_policy_info", "1 for the policy in force", labels=("policy",))
        policy.add_metric((batch.lanes.policy.name,), 1)
        yield policy
        waiting = GaugeMetricFamily("evenhand_engine_waiting", "Requests in line, by lane", labels=("lane",))
        for lane, jobs in batch.lanes.depth().items():
            waiting.add_metric((lane,), jobs)
        yield waiting
        preemptions = CounterMetricFamily(
            "evenhand_engine_preemptions", "Running requests stopped", labels=("policy", "reason")
        )
        for reason, count in (("policy", counts.displaced), ("memory", counts.preemptions - counts.displaced)):
            preemptions.add_metric((batch.lanes.policy.name, reason), count)
        yield preemptions
        slots = GaugeMetricFamily("evenhand_engine_slots", "Requests that run at once, all ranks together")
        slots.add_metric((), batch.cost.max_seqs)
        yield slots


def exposition(batch: ContinuousBatch, model: str, *, plugin: bool = False) -> bytes:
    """The whole page, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(batch, model, plugin))
    return generate_latest(registry)
