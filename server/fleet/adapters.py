"""LoRA adapters at workers: what each has loaded, and vLLM's requests to load and unload one."""

import asyncio
import re
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from server.engine.client import EngineClient
from server.request.adapters import AdapterRecord
from server.request.errors import EngineGone

RUNTIME_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
NO_LORA = "it runs without LoRA: start vLLM with --enable-lora"
_FROM_ITS_WORKER = re.compile(r"Worker failed with error '(.*)', please check", re.DOTALL)
_MOST_SAID = 300  # characters of an engine's own reason


class AdapterRefused(Exception):
    """A worker does not load, or unload, an adapter; the message says why, for operators: it may name paths."""


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def adapters_in(page: bytes) -> dict[str, str]:
    """The adapters in an engine's list of models, with the path of each. ValueError if it is no such list."""
    return {card.id: card.root or "" for card in msgspec.json.decode(page, type=_Cards).data if card.parent}


@dataclass(slots=True, eq=False)
class AdapterSite:
    """The adapters of one worker.

    loaded: name and path, least recently used first. running: requests that hold a place there, by adapter.
    most: that its engine keeps (vLLM's `--max-cpu-loras`), 0 if it runs without LoRA, None if it does not say.
    loading: loads that are under way. refused: why the worker did not load one, and until when it is not asked again.
    """

    loaded: OrderedDict[str, str] = field(default_factory=OrderedDict)
    running: Counter[str] = field(default_factory=Counter)
    loading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    refused: dict[str, tuple[float, str]] = field(default_factory=dict)
    most: int | None = None
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    def found(self, adapters: dict[str, str]) -> None:
        """What the worker lists is what it has."""
        for name in self.loaded.keys() - adapters.keys():
            del self.loaded[name]
        self.loaded.update(adapters)

    def hold(self, name: str) -> None:
        """A request for an adapter has a place at this worker."""
        self.running[name] += 1
        if name in self.loaded:
            self.loaded.move_to_end(name)

    def release(self, name: str) -> None:
        """It is over."""
        self.running[name] -= 1
        if self.running[name] <= 0:
            del self.running[name]

    def has_room(self, name: str, most: int, kept: Collection[str]) -> bool:
        """Whether `name` is loaded and in use, or can be without more than `most` in use. kept: loaded ones that stay,
        whether they are in use or not."""
        busy = self.running.keys() | set(kept)
        return name in busy or len(busy) < most

    def leaving(self, most: int, managed: Collection[str], kept: Collection[str]) -> list[str]:
        """The adapters to unload before one more is loaded, least recently used first. managed: those that may go."""
        stay = self.running.keys() | self.loading.keys() | set(kept)
        idle = [name for name in self.loaded if name in managed and name not in stay]
        return idle[: max(0, len(self.loaded) + 1 - most)]


async def list_adapters(engine: EngineClient) -> dict[str, str]:
    """The adapters that a worker has. EngineGone if it does not say."""
    answer = await engine.get("/v1/models")
    try:
        return adapters_in(answer.content)
    except ValueError:
        raise EngineGone(f"its /v1/models answers {answer.status_code} and is not a list of models") from None


async def load(engine: EngineClient, name: str, record: AdapterRecord, timeout_s: float) -> None:
    """Has a worker load an adapter that it does not have. AdapterRefused, EngineGone.

    vLLM 0.32 can also replace one (`load_inplace`), but then reads its files again in every step that uses it.
    """
    body = {"lora_name": name, "lora_path": record.path}
    answer = await engine.post("/v1/load_lora_adapter", body, timeout_s=timeout_s)
    if answer.status_code != 200:
        raise AdapterRefused(_reason(answer.status_code, answer.content, record.path))


async def unload(engine: EngineClient, name: str, timeout_s: float) -> None:
    """Has a worker unload an adapter; not to have it is as good. AdapterRefused, EngineGone."""
    answer = await engine.post("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)
    if answer.status_code not in (200, 404):
        raise AdapterRefused(_reason(answer.status_code, answer.content, ""))


def _reason(status: int, body: bytes, path: str) -> str:
    """Why an engine refuses, in one sentence."""
    said = _message(body)
    if status == 404 and (not said or said == "Not Found"):
        return f"it cannot load adapters: start vLLM with --enable-lora and {RUNTIME_UPDATES}=True"
    if "LoRA is not enabled" in said:
        return NO_LORA
    if "No adapter found" in said:
        return f"it finds no adapter at {path}"
    if (inner := _FROM_ITS_WORKER.search(said)) is not None:
        said = inner.group(1)
    return f"it answers {status}: {' '.join(said.split())[:_MOST_SAID].rstrip('.') or 'no reason'}"


class _Error(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Error | str = ""
    message: str = ""
    detail: str = ""


def _message(body: bytes) -> str:
    try:
        said = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return ""
    inner = said.error.message if isinstance(said.error, _Error) else said.error
    return inner or said.message or said.detail
