"""What scheduler/vllm/nixl.py relies on in vLLM and NIXL; the hand-over itself is in test_disaggregation.py."""

import importlib

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl", reason="NIXL is not installed")

from nixl._api import nixl_agent
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from deploy.engine.engine_args import kv_transfer
from scheduler.vllm.nixl import LONGEST_SLEEP_US, NixlConnector, _sleeping_threads
from scheduler.workers import Role

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


@pytest.mark.parametrize("role", Role)
def test_vllm_makes_this_connector_for_engines_on_a_cpu_and_its_own_beside_a_gpu(role: Role) -> None:
    ours = KVConnectorFactory.get_connector_class(KVTransferConfig(**kv_transfer(role, "cpu")))
    stock = KVConnectorFactory.get_connector_class(KVTransferConfig(**kv_transfer(role, "cuda")))
    assert ours is NixlConnector and stock is not ours and issubclass(ours, stock)
