"""Cutting a pair to max_length: one prompt for both sides, and something to score on each."""

TRUNCATION_MODES = ("keep_completion", "keep_start")

Ids = list[int]


def truncate(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    *,
    max_length: int | None,
    mode: str,
    bos_token_id: int | None,
) -> tuple[Ids, Ids, Ids] | None:
    """Cut a pair so that prompt + either completion has at most `max_length` tokens.

    "keep_completion" takes from the left of the prompt first (its BOS stays), as far as the longer
    completion needs, but leaves max(1, max_length // 4) prompt tokens; what is then still too long
    is taken from the end of the completions. "keep_start" keeps the first `max_length` tokens of
    prompt + completion.

    Args:
        prompt: token ids, at least one.
        chosen: token ids, at least one.
        rejected: token ids, at least one.
        max_length: at least 2, or None for no limit.
        mode: one of `TRUNCATION_MODES`.
        bos_token_id: the id that stays in front of a cut prompt if the prompt begins with it.

    Returns:
        The three parts, none of them empty, or None where the prompt alone fills `max_length`.
    """
    if max_length is None:
        return prompt, chosen, rejected
    if len(prompt) >= max_length:
        return None
    longer = max(len(chosen), len(rejected))
    if mode == "keep_completion" and len(prompt) + longer > max_length:
        floor = max(1, max_length // 4)
        prompt = _keep_end(prompt, max(floor, max_length - longer), bos_token_id)
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def _keep_end(prompt: Ids, keep: int, bos_token_id: int | None) -> Ids:
    """The last `keep` (>= 1) ids, the first of them BOS where the prompt began with BOS."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == bos_token_id:
        return prompt[:1] + prompt[len(prompt) - keep + 1 :]
    return prompt[-keep:]
