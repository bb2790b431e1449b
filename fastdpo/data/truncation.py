"""Cutting a pair to its lengths: one prompt for both sides, and something to score on each.

A prompt of turns loses the oldest ones, any other its left (`fastdpo.data.prompt_turns`).

A prompt of six tokens and a completion of four under max_length 8:

    whole             ppppppcccc
    keep_completion     ppppcccc    the prompt loses its left, as far as a quarter of max_length
    keep_start        ppppppcc      the completion loses its end, as in TRL
"""

from collections.abc import Callable

from fastdpo.data.prompt_turns import PromptTurns, keep_turns
from fastdpo.options import TokenizationOptions

Ids = list[int]


def truncate(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    *,
    options: TokenizationOptions,
    bos_token_id: int | None,
    find_turns: Callable[[], PromptTurns | None] = lambda: None,
) -> tuple[Ids, Ids, Ids] | None:
    """Cut a pair so that prompt + either completion keeps within the limits.

    The prompt may have `max_prompt_length` tokens, the completions `max_completion_length`. With
    "keep_completion" the prompt may have what the longer completion leaves of `max_length`, or
    max(1, max_length // 4) if that is more; what is then still too long is taken from the end of
    the completions. "keep_start" keeps the first `max_length` tokens of prompt + completion.

    A prompt that is too long loses its oldest turns, or its left where it has none; its BOS stays.

    Args:
        prompt: token ids, at least one.
        chosen: token ids, at least one.
        rejected: token ids, at least one.
        options: the three lengths, and the mode: one of `TRUNCATION_MODES`.
        bos_token_id: the id that stays in front of a cut prompt if the prompt begins with it.
        find_turns: finds the turns of the prompt, in tokens, if it has to be cut; None for none.

    Returns:
        The three parts, none of them empty, or None where "keep_start" would keep no completion.
    """
    keep = len(prompt)
    if options.max_prompt_length is not None:
        keep = min(keep, options.max_prompt_length)
    chosen = chosen[: options.max_completion_length]
    rejected = rejected[: options.max_completion_length]
    if options.max_length is not None and options.truncation_mode == "keep_completion":
        longer = max(len(chosen), len(rejected))
        keep = min(keep, max(1, options.max_length // 4, options.max_length - longer))
    elif options.max_length is not None and keep >= options.max_length:
        return None
    if keep < len(prompt):
        turns = find_turns()
        by_turns = None if turns is None else keep_turns(prompt, keep, turns)
        prompt = _keep_end(prompt, keep, bos_token_id) if by_turns is None else by_turns
    room = None if options.max_length is None else options.max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def _keep_end(prompt: Ids, keep: int, bos_token_id: int | None) -> Ids:
    """Keep the last `keep` (>= 1) ids, the first of them BOS where the prompt began with BOS."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == bos_token_id:
        return prompt[:1] + prompt[len(prompt) - keep + 1 :]
    return prompt[-keep:]
