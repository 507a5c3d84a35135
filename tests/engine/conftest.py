"""Fixtures for tests that need vLLM."""

import importlib.util
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and vLLM use deprecated parts of torch when they are imported
        import vllm.v1.engine.llm_engine  # noqa: F401
        import vllm.v1.worker.cpu_worker  # noqa: F401


@pytest.fixture(scope="session")
def hollow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that describes a tiny Llama and holds no weights."""
    from loadtest.bench.plugin.driven import model_folder, seed_block_hashes

    seed_block_hashes()
    return model_folder(tmp_path_factory.mktemp("hollow"))
