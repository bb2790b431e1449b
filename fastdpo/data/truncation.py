"""Cutting a pair to its lengths: one prompt for both sides, and something to score on each.

A prompt of six tokens and a completion of four under max_length 8:

    whole             ppppppcccc
    keep_completion     ppppcccc    the prompt loses its left, as far as a quarter of max_length
    keep_start        ppppppcc      the completion loses its end, as in TRL
"""

from fastdpo.options import TokenizationOptions

Ids = list[int]


def truncate(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    *,
    options: TokenizationOptions,
    bos_token_id: int | None,
) -> tuple[Ids, Ids, Ids] | None:
    """Cut a pair so that prompt + either completion keeps within the limits.

    First the left of the prompt is cut to `max_prompt_length` (its BOS stays) and the end of the
    completions to `max_completion_length`. Then "keep_completion" takes from the left of the prompt
    as far as the longer completion needs, but leaves max(1, max_length // 4) prompt tokens; what is
    then still too long is taken from the end of the completions. "keep_start" keeps the first
    `max_length` tokens of prompt + completion.

    Args:
        prompt: token ids, at least one.
        chosen: token ids, at least one.
        rejected: token ids, at least one.
        options: the three lengths, and the mode: one of `TRUNCATION_MODES`.
        bos_token_id: the id that stays in front of a cut prompt if the prompt begins with it.

    Returns:
        The three parts, none of them empty, or None where the prompt alone fills `max_length`.
    """
    if options.max_prompt_length is not None:
        prompt = _keep_end(prompt, options.max_prompt_length, bos_token_id)
    chosen = chosen[: options.max_completion_length]
    rejected = rejected[: options.max_completion_length]
    if options.max_length is None:
        return prompt, chosen, rejected
    if len(prompt) >= options.max_length:
        return None
    longer = max(len(chosen), len(rejected))
    if options.truncation_mode == "keep_completion" and len(prompt) + longer > options.max_length:
        floor = max(1, options.max_length // 4)
        prompt = _keep_end(prompt, max(floor, options.max_length - longer), bos_token_id)
    room = options.max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def _keep_end(prompt: Ids, keep: int, bos_token_id: int | None) -> Ids:
    """Keep the last `keep` (>= 1) ids, the first of them BOS where the prompt began with BOS."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == bos_token_id:
        return prompt[:1] + prompt[len(prompt) - keep + 1 :]
    return prompt[-keep:]
