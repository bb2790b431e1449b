"""Tools, tool calls and tool results in one form: objects without nulls, whatever they came as.

Sets hold them as objects, as JSON text, or as objects that a table has filled with nulls. A chat
template gets objects (`fastdpo.data.arrival` hands arguments on as text to one that wants text).
"""

import json
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.values import as_objects, kind_of, plain_value


def tools_of(tools: Any) -> list[Any] | None:
    """Return the JSON schemas of the tools, or None where a row has none.

    Args:
        tools: null, a list, one schema alone, or JSON text of these; each entry a schema, its JSON
            text, or from Python a function, which transformers describes.

    Raises:
        DataError: it is something else.
    """
    if isinstance(tools, str):
        tools = _json(tools, "field 'tools' is a string", "a list of tool schemas") or None
    tools = as_objects(tools)
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"field 'tools' is {kind_of(tools)}, a list of tool schemas is needed")
    return [_tool(tool, place) for place, tool in enumerate(tools)] or None


def _tool(tool: Any, place: int) -> Any:
    name = f"tools[{place}]"
    if isinstance(tool, str):
        tool = _json(tool, f"{name} is a string", "a tool schema")
    if callable(tool):
        return tool
    if not isinstance(tool, Mapping):
        raise DataError(f"{name} is {kind_of(tool)}, a tool schema (an object) is needed")
    tool = plain_value(tool)
    for schema in (tool, tool.get("function")):
        if isinstance(schema, dict) and isinstance(schema.get("parameters"), str):
            text = schema["parameters"]
            schema["parameters"] = _json(text, f"{name}.parameters is a string", "a JSON schema")
    return tool


def calls_of(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message with their arguments as objects.

    Args:
        calls: a list of calls, one call alone, or JSON text of these. A call is
            {"name", "arguments"}, or that below "function".
        place: where they stand, for messages.

    Raises:
        DataError: it is something else, or arguments are text that is no JSON.
    """
    if isinstance(calls, str):
        calls = _json(calls, f"{place} is a string", "a list of tool calls")
    calls = as_objects(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise DataError(f"{place} is {kind_of(calls)}, a list of tool calls is needed")
    return [_call(call, f"{place}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = _json(call, f"{place} is a string", '{"name": "...", "arguments": {...}}')
    if not isinstance(call, Mapping):
        raise DataError(
            f'{place} is {kind_of(call)}, {{"name": "...", "arguments": {{...}}}} is needed'
        )
    call = plain_value(call)
    if isinstance(call.get("function"), str) and call["function"].lstrip().startswith("{"):
        call["function"] = _json(call["function"], f"{place}.function is a string", "an object")
    named = call.get("function", call)
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise DataError(
            f"{place} is {kind_of(call)}, which has no name of a function; "
            '{"type": "function", "function": {"name": "...", "arguments": {...}}} is needed'
        )
    for function in (call, named):
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            name = f"{place} has 'arguments' that are a string"
            function["arguments"] = _json(function["arguments"] or "{}", name, "an object")
    return call


def call_of_text(text: Any, place: str) -> list[dict[str, Any]]:
    """Return the calls of a ShareGPT turn from function_call: JSON text of one call, or of several.

    Raises:
        DataError: it is no JSON.
    """
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place} is a function_call whose value is not JSON ({error}); it needs "
                '{"name": "...", "arguments": {...}}'
            ) from error
    return [
        call if "function" in call else {"type": "function", "function": call}
        for call in calls_of(text, place)
    ]


def result_text(content: Any) -> Any:
    """Return the result of a tool as text: an object, list or number becomes its JSON."""
    parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    )
    if content is None or isinstance(content, str) or (parts and content):
        return content
    return json.dumps(plain_value(content), ensure_ascii=False, default=str)


def _json(text: str, what: str, needed: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} that is not JSON ({error}); {needed} is needed, as JSON text or as it is"
        ) from error
