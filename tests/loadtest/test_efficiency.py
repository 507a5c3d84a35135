"""EfficientLLM's measures from samples of engines' metrics."""

import pytest

from loadtest.client.samples import sample_of
from loadtest.records import Sample
from loadtest.report.efficiency import Efficiency, efficiency

PAGE = """vllm:num_requests_running{engine="0"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
evenhand_engine_slots{pid="9"} 8.0
evenhand_engine_gpu_use{device="GPU-1",pid="9"} 0.75
evenhand_engine_energy_joules{device="GPU-1",pid="9"} 1e3
evenhand_engine_weight_compression{pid="9"} 3.5
"""


def test_engines_on_one_device_count_its_energy_once() -> None:
    other = 'evenhand_engine_energy_joules{device="GPU-1"} 1001.0\nevenhand_engine_energy_joules{device="GPU-2"} 5.0\n'
    sample = sample_of([PAGE, other], 1.0)
    assert sample.joules == {"GPU-1": 1001.0, "GPU-2": 5.0}
    assert (sample.slots, sample.gpu_use, sample.compression) == (8.0, 0.75, 3.5)


def test_means_and_power() -> None:
    samples = [
        Sample(0.0, running=2.0, kv_usage=0.2, slots=8.0),
        Sample(1.0, running=4.0, kv_usage=0.4, slots=8.0, joules={"a": 100.0, "b": 7.0}),
        Sample(2.0, running=12.0, kv_usage=0.6, slots=8.0, joules={"a": 150.0}),
        Sample(3.0, joules={"a": 20.0, "c": 5.0}, gpu_use=0.5),
        Sample(4.0, joules={"a": 50.0, "c": 15.0}, gpu_use=0.7, compression=2.0),
    ]
    found = efficiency(samples)
    assert found.memory == pytest.approx(0.4) and found.compute == pytest.approx(0.6) and found.compression == 2.0
    assert found.batch == pytest.approx((0.25 + 0.5 + 1.0) / 3)
    assert found.joules == 50.0 + 30.0 + 10.0 and found.watts == pytest.approx(30.0)


def test_nothing_told_is_nothing_known() -> None:
    assert efficiency([]) == efficiency([Sample(1.0, waiting=3.0)]) == Efficiency()
    assert efficiency([Sample(1.0, joules={"a": 1.0})]).watts is None
