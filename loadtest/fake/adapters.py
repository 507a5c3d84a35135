"""LoRA adapters of a fake engine: vLLM's two routes, with its words. An adapter's path says what is wrong with it."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from loadtest.fake import vllm_wire
from loadtest.fake.http_server import ServedExchange
from loadtest.fake.vllm_wire import WireRefusal

if TYPE_CHECKING:
    from loadtest.fake.engine import EngineSetup

_TOO_LARGE = (
    "Call to add_lora method failed: Worker failed with error 'LoRA rank 64 is greater than max_lora_rank 8.', please "
    "check the stack trace above for the root cause"
)


class Adapters:
    """What is loaded, by name. A path that ends in `missing` has no files, one in `too-large` does not fit.

    loads, unloads: names in the order in which they came. overfull: loads beyond what it keeps.
    """

    def __init__(self, setup: "EngineSetup") -> None:
        self._setup = setup
        self.loaded: dict[str, str] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.overfull = 0

    def cards(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """As /v1/models lists them."""
        return [
            {**base, "id": name, "root": path, "parent": base["id"], "max_model_len": None}
            for name, path in self.loaded.items()
        ]

    def lose(self) -> None:
        """As an engine that was restarted."""
        self.loaded.clear()

    def load(self, exchange: ServedExchange) -> None:
        body = self._body(exchange)
        asyncio.get_running_loop().call_later(self._setup.adapter_load_s, self._load, exchange, body)

    def _load(self, exchange: ServedExchange, body: Mapping[str, Any]) -> None:
        try:
            self._check(body)
        except WireRefusal as refused:
            exchange.respond(refused.status, refused.body, "application/json")
            return
        name = str(body["lora_name"])
        self.loaded[name] = str(body["lora_path"])
        self.loads.append(name)
        self.overfull += len(self.loaded) > self._setup.adapters
        exchange.respond(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), "text/plain")

    def _check(self, body: Mapping[str, Any]) -> None:
        name, path = str(body["lora_name"]), str(body["lora_path"])
        if name in self.loaded and not body.get("load_inplace"):
            raise WireRefusal(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if path.endswith("missing"):
            raise WireRefusal(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        if path.endswith("too-large"):
            raise WireRefusal(500, "InternalServerError", _TOO_LARGE)

    def unload(self, exchange: ServedExchange) -> None:
        name = str(self._body(exchange)["lora_name"])
        if self.loaded.pop(name, None) is None:
            raise WireRefusal(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        self.unloads.append(name)
        exchange.respond(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), "text/plain")

    def _body(self, exchange: ServedExchange) -> Mapping[str, Any]:
        if not self._setup.adapters:
            raise WireRefusal(HTTPStatus.NOT_FOUND, "Not Found", "Not Found")
        return vllm_wire.parse_body(exchange.body)
