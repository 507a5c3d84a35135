"""What scheduler/vllm/nixl.py relies on in vLLM and NIXL; the hand-over itself is in test_disaggregation.py."""

import importlib
import inspect
import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl", reason="NIXL is not installed")

from nixl._api import nixl_agent
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from deploy.engine.engine_args import kv_transfer
from scheduler.vllm.nixl import LONGEST_SLEEP_US, NixlConnector, _cores_kept, _sleeping_threads

pytestmark = pytest.mark.engine


def test_threads_of_agents_made_meanwhile_sleep_and_those_of_later_ones_do_not() -> None:
    bindings = importlib.import_module(nixl_agent.__module__).nixlBind

    def pause_us() -> int:
        """What NIXL's Python API comes to when it asks for none."""
        config = bindings.nixlAgentConfig()
        config.pthrDelay = 0
        pause: int = config.pthrDelay
        return pause

    with _sleeping_threads():
        assert pause_us() == LONGEST_SLEEP_US
    assert pause_us() == 0


def test_vllm_makes_this_connector_for_engines_on_a_cpu_and_its_own_beside_a_gpu() -> None:
    ours = KVConnectorFactory.get_connector_class(KVTransferConfig(**kv_transfer("cpu")))
    stock = KVConnectorFactory.get_connector_class(KVTransferConfig(**kv_transfer("cuda")))
    assert ours is NixlConnector and stock is not ours and issubclass(ours, stock)


def test_what_the_connector_does_to_its_threads_cores_is_without_effect_even_for_cores_that_it_may_not_have() -> None:
    before = os.sched_getaffinity(0)
    with _cores_kept():
        os.sched_setaffinity(0, [100_000])
        assert os.sched_getaffinity(0) == before
    with pytest.raises(OSError):
        os.sched_setaffinity(0, [100_000])


def test_vllms_connector_still_moves_threads_by_the_call_that_is_taken_from_it() -> None:
    source = inspect.getsource(importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker"))
    assert source.count("os.sched_setaffinity(") == source.count("sched_setaffinity(") == 1
