"""Downloads a model from its hub before an engine starts: reports size and progress, and resumes when interrupted."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2

from deploy.model.model import ModelError, Say, dtype_in

TOLD_EVERY_S = 5.0
WEIGH_PATIENCE_S = 30.0
# Where one of these is given, vLLM fetches other files than would be fetched here, or to another place.
ELSEWHERE = ("--download-dir", "--revision", "--code-revision", "--load-format", "--config-format", "--hf-token")
_WEIGHTS = (".safetensors", ".bin", ".pt")  # as vLLM prefers them
_SMALL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_OTHER_FORMS = ("original", "onnx", "openvino", "metal", "coreml")  # folders with the same weights in other forms


def fetched_here(engine_args: Iterable[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether vLLM will look for the model where `fetch` puts it."""
    names = {word.partition("=")[0].replace("_", "-") for word in engine_args if word.startswith("--")}
    return names.isdisjoint(ELSEWHERE) and not environ.get("VLLM_USE_MODELSCOPE")


def wanted(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that vLLM reads: one form of the weights, and what is small."""
    kept = [name for name in names if PurePosixPath(name).parts[0] not in _OTHER_FORMS]
    top = [name for name in kept if "/" not in name]
    weights: list[str] = []
    for ending in _WEIGHTS:
        weights = [name for name in top if name.endswith(ending) and not name.startswith("training_args")]
        if weights:
            break
    sharded = [name for name in weights if not name.startswith("consolidated")]
    return sorted({*(sharded or weights), *(name for name in kept if name.endswith(_SMALL))})


def fetch(name: str, say: Say) -> Path | None:
    """A hub's model into the hub's own cache, going on where an earlier try ended.

    Returns its folder there, None where the hub cannot be asked but something of the model is in the cache: then the
    engine may try. ModelError says why the model cannot be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError

    cache, missing = Path(constants.HF_HUB_CACHE), 0
    try:
        plan = snapshot_download(name, dry_run=True, tqdm_class=_telling(None))
        chosen = set(wanted([file.filename for file in plan]))
        missing = sum(file.file_size or 0 for file in plan if file.will_download and file.filename in chosen)
        if missing:
            _check_room(name, missing, cache)
            say(f"downloading {name}: {_size(missing)} to {cache}")
        return Path(snapshot_download(name, allow_patterns=sorted(chosen), tqdm_class=_telling(say, missing)))
    except (OSError, HfHubHTTPError, httpx2.HTTPError) as error:
        if why := _refusal(name, error.__cause__ if isinstance(error, DryRunError) else error, cache):
            raise ModelError(why) from error
        if missing or not _in_cache(name):
            raise ModelError(
                f"the model {name} is not on this machine, and its hub, {constants.ENDPOINT}, cannot be reached or "
                "stopped answering: start again to resume the download, or give --model the path of a folder"
            ) from error
        say(f"the model hub cannot be reached: using what the cache holds of {name}")
        return None


def _refusal(name: str, error: BaseException | None, cache: Path) -> str:
    """Why no further try would help; empty if one might."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"the model {name} requires its terms to be accepted: do so at {constants.ENDPOINT}/{name}, then set "
            "HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"the model hub has no model {name}, or it is private: correct --model, or set HF_TOKEN"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EACCES, EROFS):
        return f"cannot write the model {name} to {cache}: {error.strerror}. Set HF_HOME to another folder"
    return ""


@dataclass(frozen=True, slots=True)
class HubWeights:
    """Of a hub's model. file_bytes: its weight files, 0 if not known. dtype: the format of the numbers in them."""

    file_bytes: int = 0
    dtype: str = ""


Weighing = Callable[[str], HubWeights]


@functools.cache
def weigh(name: str) -> HubWeights:
    """Asks the hub, or its cache, in a process of its own, so that the hub's library does not stay with a gateway."""
    command = [sys.executable, "-P", "-m", "deploy.model.hub", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WEIGH_PATIENCE_S, check=True)
        return HubWeights(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return HubWeights()  # `fetch` will say why


def hub_weights(name: str) -> HubWeights:
    """As the hub tells them before anything large is fetched, or as they are in its cache."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        sizes = {file.filename: file.file_size or 0 for file in snapshot_download(name, dry_run=True)}
        folder = Path(snapshot_download(name, allow_patterns=["config.json"]))
    except (OSError, HfHubHTTPError, httpx2.HTTPError):
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            return HubWeights()
        folder = Path(cached).parent
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    weights = [file for file in wanted(list(sizes)) if file.endswith(_WEIGHTS)]
    return HubWeights(sum(sizes[file] for file in weights), dtype_in(folder))


def _in_cache(name: str) -> bool:
    """Whether some of its weights are there; its config alone may be from a look at how large it is."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return isinstance(config, str) and any(file.suffix in _WEIGHTS for file in Path(config).parent.iterdir())


def _check_room(name: str, needed: int, cache: Path) -> None:
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ModelError(
            f"{name} needs {_size(needed)} more on the disk of {cache}, which has {_size(free)} left: free some, "
            "or set HF_HOME to a folder on another disk"
        )


def _telling(say: Say | None, total: int = 0) -> type[Any]:
    """A progress bar's class that draws nothing. With `say` it tells now and then how many of the bytes are there."""
    from tqdm.auto import tqdm

    class Telling(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *words: Any, **options: Any) -> None:
            self.told_s = time.monotonic()
            self.arriving = options.get("unit") == "B" and str(options.get("desc", "")).startswith("Downloading")
            super().__init__(*words, **{**options, "file": StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            now_s = time.monotonic()
            if say is not None and self.arriving and now_s - self.told_s >= TOLD_EVERY_S:
                self.told_s = now_s
                say(f"downloading: {_size(self.n)} of {_size(total)}")
            return bool(done)

    return Telling


def main() -> int:
    sys.stdout.write(json.dumps(asdict(hub_weights(sys.argv[1]))) + "\n")
    return 0


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
