"""Bringing every row to one form and checking it: TRL's columns, messages in either spelling.

Which columns of a file are prompt, chosen and rejected is found out in `fastdpo.data.columns`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError
from fastdpo.data.tools import call_of_text, calls_of, result_text, tools_of
from fastdpo.data.values import (
    ROLES,
    kind_of,
    messages_of,
    plain_value,
    refuse_quoted_messages,
)

Messages = list[dict[str, Any]]

_SAYS_SOMETHING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One preference: prompt, chosen and rejected are all strings or all lists of messages.

    Attributes:
        prompt: the shared context.
        chosen: the preferred continuation, without the prompt.
        rejected: the other continuation, without the prompt.
        tools: JSON schemas for the chat template.
        chat_template_kwargs: further variables for the chat template.
        score_margin: the score that the row gives the chosen side less that of the rejected one,
            None where it gives none.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    score_margin: float | None = field(default=None, compare=False)

    @property
    def is_conversational(self) -> bool:
        """True where the parts are lists of messages, to be rendered by a chat template."""
        return isinstance(self.prompt, list)


def preference_row(row: Mapping[str, Any]) -> PreferenceRow:
    """Bring a raw row to a `PreferenceRow`; columns it does not know are ignored.

    Known: strings or messages with an explicit prompt; the same with the prompt implicit in
    what chosen and rejected share at their start; full conversations beside a `prompt` that
    repeats their first turns (a string, as in UltraFeedback, or messages); messages as the prompt
    with strings as completions, which are then assistant turns. Messages are role and content or,
    as in ShareGPT, from and value; a single one counts as a list of one.

    Args:
        row: the columns of one row.

    Returns:
        The row in the one shape the rest of the room knows.

    Raises:
        DataError: a field is missing, null or of a wrong type; the text names field, reason and
            remedy, the caller puts the place in front.
    """
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"'chosen' is {kind_of(chosen)} and 'rejected' is {kind_of(rejected)}; both have to be "
            "strings or both lists of messages"
        )
    if "prompt" not in row:
        split: Any = split_shared if isinstance(chosen, str) else split_turns
        prompt, chosen, rejected = split(chosen, rejected)
    else:
        prompt = _field(row, "prompt")
        if isinstance(chosen, list) and isinstance(rejected, list):
            if isinstance(prompt, str):
                prompt, chosen, rejected = _prompt_beside_messages(prompt, chosen, rejected)
            else:
                prompt, chosen, rejected = _prompt_beside_turns(prompt, chosen, rejected)
        elif isinstance(prompt, list):
            chosen = [{"role": "assistant", "content": chosen}]
            rejected = [{"role": "assistant", "content": rejected}]
    return PreferenceRow(
        prompt, chosen, rejected, tools_of(row.get("tools")), _template_variables(row)
    )


def split_shared(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split off what two strings (or two lists of messages) share at their start.

    At least one character (message) stays on each side, and a space at the end of the shared part
    goes to the completions: tokenizers join a space to the word after it. Both as TRL does.

    Args:
        chosen: a string or a list of messages.
        rejected: the same type.

    Returns:
        (prompt, rest of chosen, rest of rejected).
    """
    last = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < last and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def is_blank(completion: str | Messages) -> bool:
    """True where a completion says nothing: only whitespace, and no tool call or other field."""
    if isinstance(completion, str):
        return not completion.strip()
    return all(_is_blank_message(message) for message in completion)


def _is_blank_message(message: dict[str, Any]) -> bool:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return not content.strip() and not any(message.get(key) for key in _SAYS_SOMETHING)


def _prompt_beside_messages(
    prompt: str, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Settle a prompt string beside messages, which either repeat it or answer it."""
    shared, chosen_rest, rejected_rest = split_turns(chosen, rejected)
    roles = [message["role"] for message in chosen if message["role"] != "system"]
    if roles and roles[0] == "user" and any(turn["role"] == "user" for turn in shared):
        return shared, chosen_rest, rejected_rest
    system = [message for message in shared if message["role"] == "system"]
    turns = [*system, {"role": "user", "content": prompt}]
    chosen = _without_repeated_prompt(turns, chosen[len(system) :], "chosen")
    return turns, chosen, _without_repeated_prompt(turns, rejected[len(system) :], "rejected")


def _prompt_beside_turns(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Settle prompt messages beside completions, which either repeat them or go on from there."""
    if not any(turn["role"] == "system" for turn in prompt):
        shared = [turn for turn in chosen[:1] if turn["role"] == "system" and turn in rejected[:1]]
        if shared:  # the system's turn stands in the completions alone
            prompt = [*shared, *prompt]
    chosen = _without_repeated_prompt(prompt, chosen, "chosen")
    return prompt, chosen, _without_repeated_prompt(prompt, rejected, "rejected")


def split_turns(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Split off the turns that two conversations share at their start, as `split_shared` does.

    Where they share no user's turn letter for letter, turns count as shared that differ only in
    their white space.
    """
    parts = split_shared(chosen, rejected)
    if any(message["role"] == "user" for message in parts[0]):
        return parts
    length = len(split_shared(_spoken(chosen), _spoken(rejected))[0])
    return chosen[:length], chosen[length:], rejected[length:]


def _without_repeated_prompt(prompt: Messages, completion: Messages, name: str) -> Messages:
    """Take the prompt off a completion that is a whole conversation and repeats it.

    It may be repeated without its first turns (such as the system's) or with other white space.

    Raises:
        DataError: the completion begins with a turn that is neither an answer nor repeated.
    """
    if completion[: len(prompt)] == prompt:
        return completion[len(prompt) :]
    if not prompt or not completion or completion[0]["role"] not in ("system", "user"):
        return completion
    asked, said = _spoken(prompt), _spoken(completion)
    for start in range(len(asked)):
        length = len(asked) - start
        for skipped in (0, 1):  # a system's turn that only the completion has
            if said[skipped : skipped + length] != asked[start:]:
                continue
            if skipped and completion[0] not in prompt:
                break
            return completion[skipped + length :]
    if prompt[-1]["role"] == "assistant" and completion[0]["role"] == "user":
        return completion  # the conversation goes on
    raise DataError(
        f"{name!r} begins with a {completion[0]['role']}'s turn ({said[0][1]:.40}) and does not "
        f"repeat the prompt, whose last turn is {asked[-1][1]:.40}, so that this turn would be "
        "trained as part of the answer; let the answers begin with the assistant's turn, or leave "
        "the prompt out if they are whole conversations"
    )


def _spoken(messages: Messages) -> list[tuple[str, str]]:
    """Return the role and the content of each message, white space aside, and its tool calls."""
    spoken = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        calls = str(message["tool_calls"]) if "tool_calls" in message else ""
        spoken.append((message["role"], " ".join(content.split()) + calls))
    return spoken


def _field(row: Mapping[str, Any], name: str) -> str | Messages:
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}, an object like {ROW_SHAPE} is needed")
    if name not in row:
        raise DataError(
            f"field {name!r} is missing (the row has {', '.join(map(repr, row)) or 'no fields'}); "
            f"a preference row looks like {ROW_SHAPE}, with strings or lists of messages; rename "
            "the columns, or pass a data set of preference pairs"
        )
    value = messages_of(row[name])
    refuse_quoted_messages(value, f"field {name!r}")
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and ("content" in value or "value" in value):
        value = [value]
    if isinstance(value, list | tuple):
        return [_message(item, f"{name}[{place}]") for place, item in enumerate(value)]
    raise DataError(
        f"field {name!r} is {kind_of(value)}, a string or a list of messages is needed; correct "
        "the row or remove it"
    )


def _message(message: Any, place: str) -> dict[str, Any]:
    """Check and copy a message, without its null keys (Arrow fills absent keys with nulls)."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"{place} is {kind_of(message)}, a message like "
            '{"role": "user", "content": "..."} is needed; correct the row or remove it'
        )
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "value" in message and "role" not in message:
        return _sharegpt_message(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = f"has {kind_of(role)} as 'role'" if "role" in message else "has no 'role'"
        raise DataError(
            f"{place} {found} (its keys: {', '.join(map(repr, message)) or 'none'}); a message "
            'needs "role" ("system", "user", "assistant", "tool") and "content"'
        )
    if role == "function_call":
        return {"role": "assistant", "content": ""} | {
            "tool_calls": call_of_text(message.get("content"), place)
        }
    message["role"] = role = ROLES.get(role.lower(), role)
    _settle_calls(message, place)
    if role == "tool" and "content" in message:
        message["content"] = result_text(message["content"])
    content = message.get("content")
    if isinstance(content, str) or (content is None and "tool_calls" in message):
        return message
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return message | {"content": plain_value(content)}
    found = f"has {kind_of(content)} as 'content'" if "content" in message else "has no 'content'"
    raise DataError(
        f"{place} (role {role!r}) {found}; it needs a string, or a list of text parts like "
        '{"type": "text", "text": "..."} (images and audio are not supported)'
    )


def _settle_calls(message: dict[str, Any], place: str) -> None:
    """Bring the tool calls of a message to one form; an empty list of them is none."""
    if "function_call" in message and not message.get("tool_calls"):  # OpenAI's older form
        message["tool_calls"] = [{"type": "function", "function": message["function_call"]}]
        del message["function_call"]
    if "tool_calls" in message:
        message["tool_calls"] = calls_of(message["tool_calls"], f"{place}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]


def _sharegpt_message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    speaker, value = message["from"], message["value"]
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"{place} is from {speaker!r}, which is no speaker that is known; known are "
            f"{', '.join(ROLES)}: rename it"
        )
    if role == "tool":
        value = result_text(value)
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": call_of_text(value, place)}
    if not isinstance(value, str):
        raise DataError(f"{place} has {kind_of(value)} as 'value', a string is needed; correct it")
    return {"role": role, "content": value}


def _template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    variables = row.get("chat_template_kwargs")
    if variables is None:
        return {}
    if isinstance(variables, Mapping):
        return plain_value(variables)
    raise DataError(
        f"field 'chat_template_kwargs' is {kind_of(variables)}, an object is needed, for example "
        '{"enable_thinking": false}'
    )
