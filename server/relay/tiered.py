"""An answer that contains its service tier, for a client that sent `service_tier`.

OpenAI's answers and events have `service_tier` beside `model`; Anthropic's have it in `usage`.
"""

import msgspec

from server.relay.relay import ClientAnswer
from server.relay.renamed import RenamedAnswer
from server.request.call import Call
from server.request.tiers import told_name

_read = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class TieredAnswer(RenamedAnswer):
    """A client's answer with its tier, and with the requested model name where that differs. An answer too long to be
    held does not contain its tier."""

    def __init__(self, out: ClientAnswer, call: Call) -> None:
        super().__init__(out, call.asked)
        self._renames = bool(call.asked)
        self._in_usage = call.route.anthropic
        self._tier = msgspec.Raw(_encode(told_name(call.tier, call.route)))

    def _named(self, members: dict[str, msgspec.Raw]) -> bytes:
        if self._renames:
            members["model"] = msgspec.Raw(self.name)
        if not self._in_usage:
            members["service_tier"] = self._tier
        elif bytes(members.get("usage", b"")).startswith(b"{"):
            usage = _read(members["usage"]) | {"service_tier": self._tier}
            members["usage"] = msgspec.Raw(_encode(usage))
        return _encode(members)

    def _beginning(self, data: bytes) -> bytes:
        return super()._beginning(data) if self._renames else data

    def _learned(self, event: bytes, at: int, members: dict[str, msgspec.Raw]) -> bytes:
        return event[:at] + self._named(members)
