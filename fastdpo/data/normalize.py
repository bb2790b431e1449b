"""Bringing every row to one form and checking it: TRL's columns, messages in either spelling.

Which columns of a file are prompt, chosen and rejected is found out in `fastdpo.data.columns`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError

Messages = list[dict[str, Any]]

# What ShareGPT's "from" is as a role.
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
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
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

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
            f"'chosen' is {_kind(chosen)} and 'rejected' is {_kind(rejected)}; both have to be "
            "strings or both lists of messages"
        )
    if "prompt" not in row:
        prompt, chosen, rejected = split_shared(chosen, rejected)
    else:
        prompt = _field(row, "prompt")
        if isinstance(chosen, list) and isinstance(rejected, list):
            if isinstance(prompt, str):
                prompt, chosen, rejected = _prompt_beside_messages(prompt, chosen, rejected)
            else:
                chosen, rejected = _without_repeated_prompt(prompt, chosen, rejected)
        elif isinstance(prompt, list):
            chosen = [{"role": "assistant", "content": chosen}]
            rejected = [{"role": "assistant", "content": rejected}]
    return PreferenceRow(prompt, chosen, rejected, _tools(row), _template_variables(row))


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
    shared, chosen_rest, rejected_rest = split_shared(chosen, rejected)
    roles = [message["role"] for message in chosen if message["role"] != "system"]
    if roles and roles[0] == "user":
        return shared, chosen_rest, rejected_rest
    system = [message for message in shared if message["role"] == "system"]
    turn = {"role": "user", "content": prompt}
    return [*system, turn], chosen[len(system) :], rejected[len(system) :]


def _without_repeated_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages]:
    """Take the prompt off completions that are full conversations and repeat it."""
    length = len(prompt)
    if length and chosen[:length] == prompt and rejected[:length] == prompt:
        return chosen[length:], rejected[length:]
    return chosen, rejected


def _field(row: Mapping[str, Any], name: str) -> str | Messages:
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {_kind(row)}, an object like {ROW_SHAPE} is needed")
    if name not in row:
        raise DataError(
            f"field {name!r} is missing (the row has {', '.join(map(repr, row)) or 'no fields'}); "
            f"a preference row looks like {ROW_SHAPE}, with strings or lists of messages; rename "
            "the columns, or pass a data set of preference pairs"
        )
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and ("content" in value or "value" in value):
        value = [value]
    if isinstance(value, list | tuple):
        return [_message(item, f"{name}[{place}]") for place, item in enumerate(value)]
    raise DataError(
        f"field {name!r} is {_kind(value)}, a string or a list of messages is needed; correct the "
        "row or remove it"
    )


def _message(message: Any, place: str) -> dict[str, Any]:
    """Check and copy a message, without its null keys (Arrow fills absent keys with nulls)."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"{place} is {_kind(message)}, a message like "
            '{"role": "user", "content": "..."} is needed; correct the row or remove it'
        )
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "value" in message and "role" not in message:
        return _sharegpt_message(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = f"has {_kind(role)} as 'role'" if "role" in message else "has no 'role'"
        raise DataError(
            f"{place} {found} (its keys: {', '.join(map(repr, message)) or 'none'}); a message "
            'needs "role" ("system", "user", "assistant", "tool") and "content"'
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message
    if isinstance(content, str):
        return message
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return message
    found = f"has {_kind(content)} as 'content'" if "content" in message else "has no 'content'"
    raise DataError(
        f"{place} (role {role!r}) {found}; it needs a string, or a list of text parts like "
        '{"type": "text", "text": "..."} (images and audio are not supported)'
    )


def _sharegpt_message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    speaker, value = message["from"], message["value"]
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"{place} is from {speaker!r}, which is no speaker that is known; known are "
            f"{', '.join(_SHAREGPT_ROLES)}: rename it"
        )
    if not isinstance(value, str):
        raise DataError(f"{place} has {_kind(value)} as 'value', a string is needed; correct it")
    if speaker != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is a function_call whose value is not JSON ({error}); it needs "
            '{"name": "...", "arguments": {...}}'
        ) from error
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": role,
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and not tools.strip():
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(
                f"field 'tools' is a string that is not JSON ({error}); a list of tool schemas is "
                "needed, as JSON text or as a list"
            ) from error
    if tools is None or isinstance(tools, list):
        return tools
    raise DataError(f"field 'tools' is {_kind(tools)}, a list of tool schemas is needed")


def _template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    variables = row.get("chat_template_kwargs")
    if variables is None:
        return {}
    if isinstance(variables, Mapping):
        return {key: value for key, value in variables.items() if value is not None}
    raise DataError(
        f"field 'chat_template_kwargs' is {_kind(variables)}, an object is needed, for example "
        '{"enable_thinking": false}'
    )


def _kind(value: Any) -> str:
    """Say in words what arrived: the type and the beginning of the value."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value!r})"
    text = repr(value)
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f"{names.get(type(value), f'of type {type(value).__name__}')} ({shown})"
