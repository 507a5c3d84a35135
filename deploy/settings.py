"""The settings of `evenhand serve`: the gateway's, and what its local engines need."""

from pathlib import Path

from pydantic import Field

from deploy.engine.model import BUNDLED
from server.settings import Positive, Settings


class ServeSettings(Settings):
    """A gateway and engines on one machine."""

    model: str = Field(BUNDLED, description="model to serve: a name of ours, a folder, or a hub id")
    worker_count: int | None = Field(
        None, ge=0, le=64, description="engines that read and answer; default: 1, or none beside the two kinds below"
    )
    prefill_workers: int = Field(0, ge=0, le=64, description="engines that only read prompts")
    decode_workers: int = Field(0, ge=0, le=64, description="engines that answer what those have read")
    kv_cache_gib: int | None = Field(None, ge=1, description="KV cache of each CPU engine, GiB; default: by memory")
    engine_args: list[str] = Field(
        default_factory=list,
        description="an argument handed to vLLM as it is, e.g. --engine-arg=--max-num-seqs=8; overrides ours",
    )
    gpus: str = Field(
        "", description="GPUs to use, as indices or UUIDs: 0,1; default: all that are visible and not in use"
    )
    compile: bool = Field(
        False,
        description="compile the model at start: on a CPU some 40 s later ready, and about a seventh more tokens a "
        "second (a GPU engine always compiles)",
    )
    start_timeout_s: Positive = Field(
        900.0, description="how long a starting engine may say nothing in its log, seconds"
    )
    state_folder: Path | None = Field(None, description="where the engines' logs go; default: the user's state folder")
    dry_run: bool = Field(False, description="print what would be started on which GPUs or cores, and start nothing")
    verbose: bool = Field(False, description="show the engines' whole logs")
