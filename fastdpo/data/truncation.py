"""Cutting a pair to its lengths: one prompt for both sides, and something to score on each."""

from dataclasses import dataclass

TRUNCATION_MODES = ("keep_completion", "keep_start")

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Most tokens of a pair and of its parts; None for no limit.

    Attributes:
        max_length: of prompt + either completion, at least 2.
        mode: one of `TRUNCATION_MODES`.
        max_prompt_length: at least 1.
        max_completion_length: at least 1.

    Raises:
        ValueError: a value that is none of these.
    """

    max_length: int | None = None
    mode: str = "keep_completion"
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.mode!r}; it has to be one of "
                f"{', '.join(map(repr, TRUNCATION_MODES))}"
            )
        for name, least in (
            ("max_length", 2),
            ("max_prompt_length", 1),
            ("max_completion_length", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, at least {least} is needed, or None")


def truncate(
    prompt: Ids, chosen: Ids, rejected: Ids, *, limits: Limits, bos_token_id: int | None
) -> tuple[Ids, Ids, Ids] | None:
    """Cut a pair so that prompt + either completion keeps within its limits.

    First the left of the prompt is cut to `max_prompt_length` (its BOS stays) and the end of the
    completions to `max_completion_length`. Then "keep_completion" takes from the left of the prompt
    as far as the longer completion needs, but leaves max(1, max_length // 4) prompt tokens; what is
    then still too long is taken from the end of the completions. "keep_start" keeps the first
    `max_length` tokens of prompt + completion.

    Args:
        prompt: token ids, at least one.
        chosen: token ids, at least one.
        rejected: token ids, at least one.
        limits: what to keep within.
        bos_token_id: the id that stays in front of a cut prompt if the prompt begins with it.

    Returns:
        The three parts, none of them empty, or None where the prompt alone fills `max_length`.
    """
    if limits.max_prompt_length is not None:
        prompt = _keep_end(prompt, limits.max_prompt_length, bos_token_id)
    chosen = chosen[: limits.max_completion_length]
    rejected = rejected[: limits.max_completion_length]
    if limits.max_length is None:
        return prompt, chosen, rejected
    if len(prompt) >= limits.max_length:
        return None
    longer = max(len(chosen), len(rejected))
    if limits.mode == "keep_completion" and len(prompt) + longer > limits.max_length:
        floor = max(1, limits.max_length // 4)
        prompt = _keep_end(prompt, max(floor, limits.max_length - longer), bos_token_id)
    room = limits.max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def _keep_end(prompt: Ids, keep: int, bos_token_id: int | None) -> Ids:
    """The last `keep` (>= 1) ids, the first of them BOS where the prompt began with BOS."""
    if len(prompt) <= keep:
        return prompt
    if prompt[0] == bos_token_id:
        return prompt[:1] + prompt[len(prompt) - keep + 1 :]
    return prompt[-keep:]
