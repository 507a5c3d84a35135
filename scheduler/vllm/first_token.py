"""The first token of an answer, made by the engine that read the prompt and given out by the one that goes on with it.

vLLM's connectors move a prompt's KV and throw away the token that the prefill engine made from it: the decode engine
waits for the KV and makes it again. Here it travels among the `kv_transfer_params`; the decode engine gives it out as
soon as the request arrives, and takes it as the last token of the prompt, so that its first step makes the second.

An engine without the plug-in passes it over and does as before. So does this one wherever what comes after would depend
on who made the first token: log probabilities, a grammar, a seed, penalties on what was said.
"""

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput
from vllm.v1.request import Request

FIRST_TOKEN: Final = "evenhand_first_token"

# Of `Request`, with what `contract` checks; an engine whose vLLM lacks one makes each first token itself.
NEEDS: Final = (
    "kv_transfer_params", "prompt_token_ids", "prompt_embeds", "output_token_ids", "_all_token_ids",
    "update_block_hashes", "record_event", "take_events",
)  # fmt: skip

Matched = tuple[int | None, bool]


def is_possible(scheduler: Any) -> bool:  # noqa: ANN401
    """Whether a scheduler's engine can take over first tokens.

    Not where the last token of a prompt is computed again whoever read the rest, for a model has a state in place of a
    KV cache; nor with logits processors of one's own, which may look at what was said.
    """
    known = set(vars(Request)) | set(Request.__init__.__code__.co_names)
    if not (known.issuperset(NEEDS) and hasattr(SamplingParams, "eos_token_id")):
        return False
    processors = scheduler.vllm_config.model_config.logits_processors or entry_points(group="vllm.logits_processors")
    return not (getattr(scheduler, "has_mamba_layers", False) or processors)


def tell(transfer: dict[str, Any], request: Request) -> None:
    """Adds the token of a prompt that was read here to what is told of its KV."""
    if transfer.get("do_remote_prefill") and request.num_output_tokens == 1:
        transfer[FIRST_TOKEN] = request.output_token_ids[-1]


def take(request: Request, *, vocabulary: int, longest: int) -> int | None:
    """Makes the first token, if one came with the request, the last of its prompt, and returns it.

    None, and nothing is changed, if it has to be made here. vocabulary: tokens of the model. longest: of a prompt and
    its answer.
    """
    transfer = request.kv_transfer_params
    if not isinstance(transfer, dict) or (token := transfer.pop(FIRST_TOKEN, None)) is None:
        return None
    fits = type(token) is int and 0 <= token < vocabulary and request.num_tokens + 1 < longest
    if not (fits and transfer.get("do_remote_prefill") and _is_like_any_other(request, token)):
        return None
    params = copy.copy(request.sampling_params)
    params.max_tokens -= 1
    params.min_tokens = max(0, params.min_tokens - 1)
    request.sampling_params = params
    request.max_tokens -= 1
    request.prompt_token_ids = [*request.prompt_token_ids, token]
    request._all_token_ids.append(token)
    request.num_prompt_tokens += 1
    request.update_block_hashes()
    transfer[FIRST_TOKEN] = token  # its KV is not among what was computed elsewhere
    return int(token)


def _is_like_any_other(request: Request, token: int) -> bool:
    """Whether a token of the answer may count as one of the prompt without anybody noticing."""
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None or request.max_tokens < 2 or request.resumable:
        return False
    if request.structured_output_request is not None or request.prompt_embeds is not None:
        return False
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}  # an end is for this engine to see
    depends = (
        params.seed, params.logprobs, params.prompt_logprobs, params.presence_penalty or None,
        params.frequency_penalty or None, params.bad_words or None, getattr(params, "thinking_token_budget", None),
        getattr(params, "repetition_detection", None), getattr(params, "logprob_token_ids", None),
    )  # fmt: skip
    return token not in ends and all(value is None for value in depends)


def output_of(request: Request, token: int, *, log_stats: bool) -> EngineCoreOutput:
    """The first token as vLLM's front end gets it: the request counts as started, its prompt as fetched."""
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        stats.set(request.num_prompt_tokens - 1, 0, request.num_prompt_tokens - 1)
        request.prefill_stats = None
    if log_stats:
        request.record_event(EngineCoreEventType.SCHEDULED)
    more = {} if stats is None else {"prefill_stats": stats}
    return EngineCoreOutput(request_id=request.request_id, new_token_ids=[token], events=request.take_events(), **more)


def without_first_token(matched: Callable[[Request, int], Matched]) -> Callable[[Request, int], Matched]:
    """A connector's `get_num_new_matched_tokens`, which takes a whole prompt for fetched, for prompts that end with the
    first token of the answer."""

    def fetched(request: Request, computed: int) -> Matched:
        tokens, is_async = matched(request, computed)
        transfer = request.kv_transfer_params
        if not tokens or not isinstance(transfer, dict) or FIRST_TOKEN not in transfer:
            return tokens, is_async
        if computed + tokens < request.num_prompt_tokens:  # another connector's, which has no more
            return tokens, is_async
        return tokens - 1, is_async and tokens > 1

    return fetched
