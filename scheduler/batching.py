"""How running prompts share one engine step: how far each is cut short for a better-ranked head."""

from collections.abc import Sequence


def prompt_cap(step_tokens: int, decoding: int, unread_tokens: Sequence[int], head_tokens: int) -> int | None:
    """The most tokens that each prompt being read may take in this step, or None if there is room for all.

    An engine serves what runs first, so a long prompt takes every token of every step until it is read, and a short
    request that has a slot waits for that. With this cap it starts at once: the prompts share what the sequences that
    decode and the head leave over. All are at least one token, so nobody stands still.

    step_tokens: that a step computes at most. decoding: sequences that make a token in the step.
    unread_tokens: of each prompt that is being read. head_tokens: that the head wants to compute.
    """
    wanted = sum(unread_tokens)
    if not unread_tokens or decoding + wanted + head_tokens <= step_tokens:
        return None
    # The head gets at most half of what is left, or a long head would only trade places with a long prompt.
    left = max(0, step_tokens - decoding)
    share = max(1, (left - min(head_tokens, left // 2)) // len(unread_tokens))
    return share if share < max(unread_tokens) else None


def equal_share(tokens: int, wanted: Sequence[int]) -> int:
    """The most tokens that each may take of `tokens` so that all together take no more: those that want less leave the
    rest to the others. All of them where there is enough."""
    left = tokens
    for others, want in zip(range(len(wanted), 0, -1), sorted(wanted), strict=True):
        if want * others > left:
            return max(1, left // others)
        left -= want
    return tokens
