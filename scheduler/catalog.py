"""The policies by name, with their options: what `--policy` and `--policy-option` accept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scheduler.policies.fcfs import Fcfs
from scheduler.policies.gittins import Gittins
from scheduler.policies.mlfq import Mlfq
from scheduler.policies.srpt import Srpt
from scheduler.policies.vtc import Vtc
from scheduler.policy import Order, Policy


@dataclass(frozen=True, slots=True)
class PolicyOption:
    """One option of a policy.

    parse: turns the text into the value, or raises ValueError with what is allowed.
    default: as it would be typed.
    unit: "" for a plain choice.
    text: one line for `--help`.
    """

    name: str
    parse: Callable[[str], Any]
    default: str
    unit: str
    text: str


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One policy of the table. `order` builds its order from parsed options; None if it takes the one of `within`."""

    text: str
    options: tuple[PolicyOption, ...]
    order: Callable[..., Order] | None


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        allowed = f"a whole number, {least} or more"
        try:
            value = int(text)
        except ValueError:
            raise ValueError(allowed) from None
        if value < least:
            raise ValueError(allowed)
        return value

    return parse


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        allowed = f"a number, {least:g} or more"
        try:
            value = float(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not value >= least:
            raise ValueError(allowed)
        return value

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


_PREFILL = PolicyOption(
    "prefill_tokens_per_step", _whole(1), "256", "tokens", "prompt tokens that take as long as one decode step"
)
_TAIL = PolicyOption("tail", _number(0.0), "inf", "ratio", "bound on the P99 TTFT, as a multiple of that under FCFS")
_STALL = PolicyOption(
    "stall_s", _number(0.0), "inf", "s", "time after which an answer that was interrupted goes on; inf: patience_s"
)
_ADMISSION = PolicyOption(
    "admission",
    _one_of("now", "peak"),
    "now",
    "",
    "peak: start a request only if the batch is expected to fit into KV memory to its end",
)
_CAP = PolicyOption("preemptions_per_s", _whole(0), "100", "1/s", "most requests preempted per second")

POLICIES: Mapping[str, CatalogEntry] = {
    "fcfs": CatalogEntry("first come, first served", (), Fcfs),
    "mlfq": CatalogEntry(
        "skip-join multi-level feedback queue (FastServe): the least served first",
        (
            PolicyOption(
                "quantum_steps",
                _whole(1),
                "16",
                "decode steps",
                "quantum of the highest level; doubles with each level",
            ),
            PolicyOption("levels", _whole(1), "6", "levels", "number of levels"),
            _PREFILL,
            PolicyOption(
                "patience_s", _number(0.0), "10", "s", "waiting time after which a request is promoted; inf for never"
            ),
            _CAP,
            _TAIL,
        ),
        Mlfq,
    ),
    "vtc": CatalogEntry(
        "virtual token counter (VTC): fair between tenants",
        (
            PolicyOption("prompt_weight", _number(0.0), "1", "service/token", "service per prompt token (VTC's w_p)"),
            PolicyOption("output_weight", _number(0.0), "2", "service/token", "service per output token (VTC's w_q)"),
            PolicyOption(
                "predict",
                _one_of("none", "last5"),
                "none",
                "",
                "last5: charge the mean of a tenant's last five outputs in advance",
            ),
            PolicyOption("charge", _one_of("all", "computed"), "all", "", "computed: cached prompt tokens are free"),
            PolicyOption(
                "slots",
                _one_of("free", "shared"),
                "free",
                "",
                "shared: a tenant with few slots may take one from a tenant with many",
            ),
            _CAP,
            PolicyOption(
                "burst", _number(0.0), "0", "requests", "credit of a returning tenant, in requests of mean size"
            ),
            PolicyOption(
                "within", _one_of("fcfs", "mlfq", "gittins", "srpt"), "fcfs", "", "order of the requests of one tenant"
            ),
        ),
        None,
    ),
    "gittins": CatalogEntry(
        "Gittins index: learns output lengths, the request likeliest to end soon first",
        (
            _PREFILL,
            PolicyOption("hysteresis", _number(1.25), "1.6", "ratio", "how much higher an index must be to preempt"),
            PolicyOption(
                "patience_s", _number(0.0), "60", "s", "waiting time after which a request goes first; inf for never"
            ),
            _STALL,
            _CAP,
            PolicyOption(
                "min_samples", _whole(20), "50", "jobs", "finished requests that a class needs before it counts"
            ),
            PolicyOption("window", _whole(100), "2000", "jobs", "latest requests that a class remembers"),
            PolicyOption(
                "max_tokens", _one_of("use", "ignore"), "use", "", "ignore: max_tokens says nothing about the length"
            ),
            replace(_TAIL, default="0.8"),
            _ADMISSION,
        ),
        Gittins,
    ),
    "srpt": CatalogEntry(
        "shortest remaining time first, if max_tokens is the true length",
        (
            _PREFILL,
            PolicyOption(
                "hysteresis", _number(1.1), "1.3", "ratio", "how much longer the preempted request's rest must be"
            ),
            PolicyOption(
                "patience_s", _number(0.0), "60", "s", "waiting time after which a request goes first; inf for never"
            ),
            _STALL,
            _CAP,
            _TAIL,
            _ADMISSION,
        ),
        Srpt,
    ),
}


def build(name: str, options: Mapping[str, str]) -> Policy:
    """The policy `name` with its options as text; ValueError says what is wrong and what is allowed."""
    entry = _entry(name)
    if entry.order is not None:
        return Policy(name, entry.order(**_parse(name, entry.options, options)))
    within = options.get("within", "fcfs")
    own = {option.name for option in entry.options}
    inner = POLICIES.get(within)
    inner_names = {option.name for option in inner.options} if inner is not None else set()
    values = _parse(name, entry.options, {key: value for key, value in options.items() if key not in inner_names - own})
    order = build(str(values.pop("within")), {key: value for key, value in options.items() if key in inner_names})
    return Policy(name, order.order, Vtc(**values))


def choose(text: str) -> tuple[str, dict[str, str]]:
    """`NAME[:KEY=VALUE…]` → name and options. ValueError for a policy or an option that there is not."""
    name, *pairs = text.split(":")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    build(name, options)
    return name, options


def describe() -> str:
    """The table of policies and options for `--help`."""
    lines: list[str] = []
    for name, entry in POLICIES.items():
        lines.append(f"{name}: {entry.text}")
        for option in entry.options:
            unit = f" {option.unit}" if option.unit else ""
            lines.append(f"  {option.name}={option.default}{unit}: {option.text}")
    return "\n".join(lines)


def _entry(name: str) -> CatalogEntry:
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _parse(name: str, known: tuple[PolicyOption, ...], given: Mapping[str, str]) -> dict[str, Any]:
    table = {option.name: option for option in known}
    for key in given:
        if key not in table:
            choices = ", ".join(table) or "none at all"
            raise ValueError(f"policy {name!r} has no option {key!r}: it takes {choices}")
    values: dict[str, Any] = {}
    for option in known:
        text = given.get(option.name, option.default)
        try:
            values[option.name] = option.parse(text)
        except ValueError as error:
            raise ValueError(f"option {option.name}={text!r} of policy {name!r} must be {error}") from None
    return values


def options_from(pairs: object) -> dict[str, str]:
    """Options out of ["name=value", …]. ValueError if they do not look like it."""
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, str) and "=" in pair for pair in pairs):
        raise ValueError('evenhand_policy_options must be a list like ["quantum_steps=32", "levels=6"]')
    return dict(pair.split("=", 1) for pair in pairs)
