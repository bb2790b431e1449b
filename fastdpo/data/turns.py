"""Where the assistant's turns lie in a rendered completion of several turns.

In such a completion tool results and user turns are not the policy's words. A template with
generation markers says itself what is; with any other the conversation is rendered turn after turn,
and a turn is what a rendering has more than the one before:

    before it          ... <user> weather? </user>
    with the prompt    ... <user> weather? </user><assistant>
    the turn           ... <user> weather? </user><assistant> call weather </assistant>
    all                ... <user> weather? </user><assistant> call weather </assistant><tool> rain
    scored                                                   `---------------------'
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one behind the last."""

Render = Callable[[Messages, bool], str]
"""Renders a conversation, with the prompt for a further assistant turn or without."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EVIDENCE_LETTERS = 20


class AssistantTurns:
    """Finds the assistant's turns of completions under one tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer

    def spans(
        self,
        prompt: Messages,
        completion: Messages,
        text: str,
        render: Render,
        tools: list[Any] | None,
        variables: dict[str, Any],
    ) -> list[Span] | None:
        """Return the spans of `text` that the policy writes; None: all of the completion.

        The first turn begins where the completion does and the last one ends where it does, as in
        a completion of a single turn.

        Args:
            prompt: the turns before the completion.
            completion: its turns.
            text: both, rendered.
            render: renders other conversations as `text` was.
            tools: what the template was given as tools.
            variables: what it was given besides.

        Raises:
            DataError: the template does not tell where turns lie.
        """
        if not has_several_turns(completion):
            return None
        messages = prompt + completion

        def render_part(part: Messages, add_generation_prompt: bool) -> str:
            try:
                return render(part, add_generation_prompt)
            except DataError as error:
                raise _not_found(f"up to turn {len(part)}, {error}") from error

        turns = [i for i in range(len(prompt), len(messages)) if _is_assistant(messages[i])]
        spans = self._marked(messages, text, tools, variables)[-len(turns) :] if turns else []
        if not spans or not _hold_their_words(spans, turns, messages, text):
            spans = [_rendered_turn(messages, i, text, render_part) for i in turns]
        if spans and _is_assistant(completion[0]):
            spans[0] = (0, spans[0][1])
        if spans and _is_assistant(completion[-1]):
            spans[-1] = (spans[-1][0], len(text))
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise _not_found("its turns overlap, rendered one after another")
        return spans

    def _marked(
        self,
        messages: Messages,
        text: str,
        tools: list[Any] | None,
        variables: dict[str, Any],
    ) -> list[Span]:
        """The spans of all assistant turns by generation markers; none where they are not exact."""
        template = self._tokenizer.get_chat_template(tools=tools)
        if not _MARKER.search(template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        known: dict[str, Any] = {**self._tokenizer.special_tokens_map, **variables}
        rendered: Any = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **known,
        )
        (whole,), (spans,) = rendered
        joined: list[Span] = []
        for start, end in spans:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        exact = whole.startswith(text) and len(joined) == sum(map(_is_assistant, messages))
        return joined if exact else []


def has_several_turns(completion: str | Messages) -> bool:
    """Tell whether a completion is more than the one turn of an assistant."""
    return not isinstance(completion, str) and [each["role"] for each in completion] != [
        "assistant"
    ]


def _rendered_turn(messages: Messages, index: int, text: str, render: Render) -> Span:
    """The span of the assistant turn number `index`, by the conversations up to it."""
    before, prompted = render(messages[:index], False), render(messages[:index], True)
    if not (text.startswith(before) and prompted.startswith(before)):
        raise _not_found(
            f"it writes the turns before turn {index + 1} otherwise once further ones follow"
        )
    start = _shared_letters(prompted, text)
    through = render(messages[: index + 1], False)
    if text.startswith(through):
        evident, end = start, len(through)
    else:
        # Some templates write more into the last turn, such as empty thoughts before its words.
        evident = _shared_letters(through, text)
        end = evident + _overlap(through, text[evident : evident + len(through)])
    if evident < start or end <= start or not _holds(text[evident:end], messages[index]):
        raise _not_found(f"it writes turn {index + 1} otherwise once further ones follow")
    return start, end


def _shared_letters(text: str, other: str) -> int:
    """How many characters two texts share at their start."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _overlap(text: str, beginning_of: str) -> int:
    """How many characters the longest end of `text` has that `beginning_of` begins with."""
    for length in range(min(len(text), len(beginning_of)), 0, -1):
        if text[-length] == beginning_of[0] and text.endswith(beginning_of[:length]):
            return length
    return 0


def _hold_their_words(spans: list[Span], turns: list[int], messages: Messages, text: str) -> bool:
    return all(
        _holds(text[start:end], messages[index])
        for (start, end), index in zip(spans, turns, strict=True)
    )


def _holds(text: str, message: dict[str, Any]) -> bool:
    """Tell whether a piece of text holds the end of a message, as far as it has words."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    lines = [line.strip() for line in content.splitlines()] if isinstance(content, str) else []
    words = [line[-_EVIDENCE_LETTERS:] for line in lines if line][-1:]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        words += [function["name"]] if isinstance(function.get("name"), str) else []
    return all(word in text for word in words)


def _is_assistant(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def _not_found(reason: str) -> DataError:
    return DataError(
        "a completion has several turns, and which of its tokens the assistant writes cannot be "
        f"told under this chat template: {reason}; set a tokenizer.chat_template that shows every "
        "turn and marks the assistant's with {% generation %}, or pass --score_turns all to score "
        "every token, as TRL does"
    )
