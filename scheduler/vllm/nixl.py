"""vLLM's NIXL connector for engines on a CPU, where what waits must not take the core on which the engine computes.

NIXL's thread, as of 1.5, asks for events without a pause as long as the engine lives, and its Python API has no way to
say otherwise (`pthrDelay` is 0); here it sleeps until there is something to do.

vLLM's connector moves the thread that makes it, which is the one that computes, to the last core of each NUMA node:
every engine of a machine to the same, and in a container to one that it may not have. Here the thread stays.

In use where `kv_connector_module_path` names this module; engines with vLLM's own connector exchange KV with it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as StockConnector
from vllm.v1.kv_cache_interface import KVCacheConfig

LONGEST_SLEEP_US = 1000  # events wake it before; NIXL knows whole milliseconds


class NixlConnector(StockConnector):  # type: ignore[misc]  # vLLM is untyped here
    """The same under the same name, which vLLM looks at in several places. Made twice in an engine's process: where it
    schedules, and where it computes."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        with _sleeping_threads(), _cores_kept():
            super().__init__(vllm_config, role, kv_cache_config)


@contextmanager
def _cores_kept() -> Iterator[None]:
    """Nothing in this process moves a thread to other cores meanwhile."""
    move = os.sched_setaffinity
    os.sched_setaffinity = lambda pid, cores: None
    try:
        yield
    finally:
        os.sched_setaffinity = move


@contextmanager
def _sleeping_threads() -> Iterator[None]:
    """NIXL agents that are made meanwhile have a thread that sleeps."""
    from nixl._api import nixl_agent  # late: vLLM sets UCX's environment before

    bindings = sys.modules[nixl_agent.__module__].nixlBind
    restless = bindings.nixlAgentConfig

    class Restful(restless):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
            super().__setattr__(name, LONGEST_SLEEP_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Restful
    try:
        yield
    finally:
        bindings.nixlAgentConfig = restless
