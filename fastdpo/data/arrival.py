"""Seeing to it that everything a row says arrives in the text that its chat template writes.

Most templates know some roles and leave out the turn of any other one without a word,
drop what they did not expect, or write an object as Python would. Nothing of this is an error to
them. So what a template can do is tried out, once for each kind of turn, and after rendering the
content of every turn is looked for in the text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages

_PROBE = "qprobex"
_CALL = {"name": _PROBE, "arguments": {"city": "Oslo"}}

Render = Callable[[Messages], str]


class TemplateAbilities:
    """The abilities of one chat template, tried out as soon as a row asks for them.

    Args:
        template: its source, to see which roles it names.
        render: renders a conversation; raises DataError where the template does.
    """

    def __init__(self, template: Any, render: Render):
        self._render = render
        self._names_developer = "developer" in str(template)
        self._tried: dict[str, bool] = {}
        self._shown: set[tuple[str, bool]] = set()

    def adapt(self, messages: Messages) -> Messages:
        """Return a conversation as the template can show it.

        A `developer` is a `system` to a template that does not know the name, a list of text parts
        becomes their text for one that takes strings alone (and the other way round), and arguments
        of tool calls become JSON text for one that does not write objects as JSON.
        """
        return [self._adapt(message) for message in messages]

    def check(self, messages: Messages, text: str, render: Render | None = None) -> None:
        """Refuse a conversation of which a turn's content, or a tool call, is not in its text.

        Args:
            messages: as they were rendered.
            text: what the template made of them.
            render: renders such messages, with the tools of the row; tries each role once.

        Raises:
            DataError: it names the role, the turn and its content.
        """
        squeezed = ""
        for place, message in enumerate(messages):
            kind = (str(message["role"]), "tool_calls" in message)
            if kind not in self._shown and render is not None:
                self._try_role(messages, place, render)
                self._shown.add(kind)
            for said in _said(message):
                if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
                    continue
                squeezed = squeezed or "".join(text.split())
                if "".join(said.split()) not in squeezed:
                    raise _lost(message, place, said)

    def _try_role(self, messages: Messages, place: int, render: Render) -> None:
        """Put another text into a turn: a short content can stand in the text by chance."""
        message = messages[place]
        content = message.get("content")
        if not content:
            return
        other: Any = _PROBE if isinstance(content, str) else [{"type": "text", "text": _PROBE}]
        tried = [*messages[:place], message | {"content": other}, *messages[place + 1 :]]
        if _PROBE not in render(tried):
            raise _lost(message, place, next(iter(_said(message)), ""))

    def _adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        content, role = message.get("content"), message["role"]
        if role == "developer" and not self._names_developer:
            message = message | {"role": "system"}
        if isinstance(content, list) and not self._shows_parts():
            message = message | {"content": "".join(part["text"] for part in content)}
        elif isinstance(content, str) and self._wants_parts():
            message = message | {"content": [_part(content)]}
        if "tool_calls" in message and self._wants_text():
            calls = [_with_text(call) for call in message["tool_calls"]]
            message = message | {"tool_calls": calls}
        return message

    def _shows_parts(self) -> bool:
        return self._shows("parts", _user([_part(_PROBE)]))

    def _wants_parts(self) -> bool:
        return not self._shows("text", _user(_PROBE)) and self._shows_parts()

    def _shows(self, ability: str, messages: Messages) -> bool:
        if ability not in self._tried:
            text = self._try(messages)
            self._tried[ability] = text is not None and _PROBE in text and "{'" not in text
        return self._tried[ability]

    def _wants_text(self) -> bool:
        """True where a call's arguments arrive as JSON only if they are handed over as text."""
        if "arguments" not in self._tried:
            as_object, as_text = (
                self._try([*_user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}])
                for call in (
                    {"type": "function", "function": _CALL},
                    _with_text({"function": _CALL}),
                )
            )
            fails = as_object is None or "{'city'" in as_object
            self._tried["arguments"] = fails and as_text is not None
        return self._tried["arguments"]

    def _try(self, messages: Messages) -> str | None:
        try:
            return self._render(messages)
        except DataError:
            return None


def _said(message: Mapping[str, Any]) -> Sequence[str]:
    """Return the texts of a turn that must arrive; earlier thoughts may be left out."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    if message["role"] == "assistant":
        texts = [re.split(r"</think(?:ing)?>|\[/THINK\]", text)[-1] for text in texts]
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        texts.append(str(function.get("name", "") if isinstance(function, Mapping) else function))
    return [text.strip() for text in texts if text.strip()]


def _lost(message: Mapping[str, Any], place: int, said: str) -> DataError:
    calls = " and its tool calls" if "tool_calls" in message else ""
    return DataError(
        f"the chat template leaves out the turn of the role {message['role']!r}{calls} (turn "
        f"{place + 1}: {said!r:.60}), so it would not be trained on; rename the role to one that "
        "the template knows (most know system, user and assistant, some know tool), or set another "
        "tokenizer.chat_template"
    )


def _user(content: Any) -> Messages:
    return [{"role": "user", "content": content}]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as JSON text."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return dict(call)
    text = json.dumps(function["arguments"], ensure_ascii=False)
    function = {**function, "arguments": text}
    return {**call, "function": function} if "function" in call else function
