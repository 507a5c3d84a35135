"""The allow-list of request fields, by route. Other fields are refused unless a tenant is granted them.

A list of what is allowed, because an engine's next version may read a field that nobody here has heard of: one that
fetches from an address of the client's, that names another tenant's data, or that makes the engine work uncounted.
"""

from collections.abc import Mapping

# What OpenAI's and Anthropic's own references list, for the fields that concern more than one route.
_SAMPLING = frozenset(
    "model stream temperature top_p stop seed user logit_bias presence_penalty frequency_penalty".split()
)
_OPENAI = _SAMPLING | frozenset(
    "stream_options metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls tools tool_choice top_logprobs".split()
)

# Parameters of vLLM (SGLang and others have some of them too) that change nothing but how this one answer is sampled,
# when it ends, and what is told about it.
_VLLM_SAMPLING = frozenset(
    "top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens "
    "skip_special_tokens spaces_between_special_tokens allowed_token_ids bad_words structured_outputs guided_json "
    "guided_regex guided_choice guided_grammar repetition_detection thinking_token_budget include_reasoning "
    "watermarking chat_template_kwargs session_id".split()
)
_VLLM = _VLLM_SAMPLING | frozenset(
    "stream_interval truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids echo add_special_tokens "
    "return_token_ids return_tokens_as_token_ids return_token_offsets return_prompt_text".split()
)
_CHAT_PROMPT = frozenset("messages add_generation_prompt continue_final_message documents".split())

ALLOWED: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": _OPENAI
    | _VLLM
    | _CHAT_PROMPT
    | frozenset(
        "max_tokens max_completion_tokens n logprobs response_format reasoning_effort verbosity modalities audio "
        "prediction web_search_options functions function_call".split()
    ),
    "/v1/completions": _SAMPLING
    | _VLLM
    | frozenset("prompt suffix max_tokens n best_of logprobs stream_options response_format service_tier".split()),
    "/v1/responses": _OPENAI
    | _VLLM_SAMPLING
    | frozenset(
        "input instructions max_output_tokens max_tool_calls reasoning text truncation include "
        "context_management".split()
    ),
    "/v1/messages": frozenset(
        "model stream messages max_tokens metadata stop_sequences system temperature thinking tool_choice tools top_k "
        "top_p service_tier output_config output_format container context_management cache_control mcp_servers "
        "inference_geo speed watermarking chat_template_kwargs".split()
    ),
    "/v1/embeddings": frozenset(
        "model stream input messages user dimensions encoding_format truncate_prompt_tokens truncation_side padding "
        "service_tier add_special_tokens use_activation normalize embed_dtype endianness".split()
    ),
    "/v1/messages/count_tokens": frozenset(
        "model messages system thinking tool_choice tools output_config output_format context_management cache_control "
        "mcp_servers chat_template_kwargs".split()
    ),
    "/tokenize": _CHAT_PROMPT
    | frozenset("model stream prompt tools return_token_strs add_special_tokens chat_template_kwargs".split()),
    "/detokenize": frozenset("model tokens".split()),
}

# Fields whose text engines put into the prompt; what a tenant was granted beyond the list may be there too.
PROMPT = frozenset(
    "messages prompt input system instructions tools functions documents suffix response_format "
    "chat_template_kwargs".split()
)
