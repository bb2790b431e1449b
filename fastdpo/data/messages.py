"""Making turns of a conversation from columns of text, and cutting transcripts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages, PreferenceRow
from fastdpo.data.values import is_message, message_role, messages_of

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def question_of(row: Mapping[str, Any], question: str, more: str | None) -> str:
    """Return the text of a user's turn: the question, and further input on lines of its own."""
    value = messages_of(row.get(question))
    further = row.get(more) if more is not None else None
    for column, text in ((question, value), (more, further)):
        if not isinstance(text, str) and not (column == more and text is None):
            raise DataError(f"column {column!r} is {text!r:.40}, a string is needed")
    return f"{value}\n{further}" if further else str(value)


def history_turns(history: Any) -> Messages:
    """Make the turns before the question of a list of [question, answer], or of messages."""
    history = messages_of(history)
    if history is None or history == "":
        return []
    if not isinstance(history, list | tuple):
        raise DataError(f"the history is {history!r:.40}, a list of [question, answer] is needed")
    turns = []
    for exchange in history:
        if is_message(exchange):
            turns.append(dict(exchange))
            continue
        texts = list(exchange) if isinstance(exchange, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"the history holds {exchange!r:.40}, a list of [question, answer] is needed"
            )
        turns.append({"role": "user", "content": texts[0]})
        turns.append({"role": "assistant", "content": texts[1]})
    return turns


def with_system(row: PreferenceRow, system: Any) -> PreferenceRow:
    """Put a system text in front of the conversation; strings beside it become turns.

    An empty or null text adds no turn, nor does any where the conversation has one.
    """
    if system is not None and not isinstance(system, str):
        raise DataError(f"the system turn is {system!r:.40}, a string or null is needed")
    prompt, chosen, rejected = row.prompt, row.chosen, row.rejected
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen = [{"role": "assistant", "content": chosen}]
        rejected = [{"role": "assistant", "content": rejected}]
    if system and not any(message["role"] == "system" for message in prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
    return replace(row, prompt=prompt, chosen=chosen, rejected=rejected)


def with_answer_start(row: PreferenceRow, start: Any) -> PreferenceRow:
    """Put the beginning that both answers share where they begin.

    In ready-made text that is the end of the prompt; in a conversation it is the beginning of both
    answers, whose first turn must be text.
    """
    if start is None or start == "":
        return row
    if not isinstance(start, str):
        raise DataError(f"the beginning of the answers is {start!r:.40}, a string is needed")
    if isinstance(row.prompt, str):
        return replace(row, prompt=row.prompt + start)
    sides = []
    for side in (row.chosen, row.rejected):
        first, *others = side if isinstance(side, list) and side else [{}]
        if not isinstance(first.get("content"), str):
            raise DataError(
                f"the answers should begin with {start!r:.40}, and a side's first turn is "
                f"{first!r:.40}, which is no text; leave it out with --columns answer_start=none"
            )
        sides.append([first | {"content": start + first["content"]}, *others])
    return replace(row, chosen=sides[0], rejected=sides[1])


def is_answer(value: Any) -> bool:
    """True where a completion is the answer alone, without the conversation before it."""
    value = messages_of(value)
    if not isinstance(value, list | tuple):
        return True
    return message_role(value[0] if value else None) == "assistant"


def is_transcript(value: Any) -> bool:
    """True where a string is a dialogue of Human and Assistant, as in HH-RLHF."""
    return isinstance(value, str) and value.startswith(HUMAN) and ASSISTANT in value


def split_transcripts(chosen: Any, rejected: Any) -> tuple[str, str, str]:
    """Split two transcripts into (prompt, chosen, rejected).

    The prompt ends where the last answer begins whose beginning they share, so that every word of
    both answers is scored (the longest common text would end inside them).
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = chosen.rfind(ASSISTANT)
        while start >= 0:
            end = start + len(ASSISTANT)
            if chosen[:end] == rejected[:end]:
                return chosen[:end], chosen[end:], rejected[end:]
            start = chosen.rfind(ASSISTANT, 0, start)
    raise DataError(
        f"chosen and rejected are no transcripts that share a turn up to {ASSISTANT.strip()!r}, as "
        "those of the first row are; correct the row or remove it"
    )
