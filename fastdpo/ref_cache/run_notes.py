"""Small notes in a store on what each run requested, so that a miss can be explained.

A note is no part of any key, and no log-prob depends on it: without notes everything works, and
only the reason of a miss is unknown.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdpo.batching import PairGroups
from fastdpo.options import PreferenceOptions
from fastdpo.ref_cache.store import MANIFEST, ReferenceStore
from fastdpo.system import files

NOTES = "asked-*.json"
MAX_NOTE_BYTES = 2**16
MOST_NOTES = 64
MOST_REASONS = 3


def describe_request(
    groups: PairGroups,
    options: PreferenceOptions,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
) -> dict[str, Any]:
    """The options and files that shaped the rows of a data set, ready for JSON."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True, default=str)
    return {
        "data": groups.pairs.report.source,
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "max_completion_length": options.max_completion_length,
        "truncation_mode": options.truncation_mode,
        "special_tokens_in_content": options.special_tokens_in_content,
        "score_turns": options.score_turns,
        "tokenizer": str(tokenizer.name_or_path),
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:12],
        "template_date": groups.pairs.report.template_date,
        "model": model_name,
        "rows": groups.pairs.report.rows_read,
        "pairs": len(groups),
    }


def record_request(store: ReferenceStore, requested: Mapping[str, Any]) -> None:
    """Write a note of what this run requests."""
    text = json.dumps(dict(requested), sort_keys=True)
    path = store.folder / f"asked-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with suppress(OSError):  # a read-only store is a store
        files.write_json(path, {"at": time.time(), "asked": dict(requested)})


def load_requests(folder: Path) -> list[dict[str, Any]]:
    """The requests of earlier runs to a store, newest first; unreadable notes are skipped."""
    dated = []
    for path in folder.glob(NOTES):
        content = _json(path)
        if isinstance(content.get("asked"), dict) and isinstance(content.get("at"), int | float):
            dated.append((content["at"], content["asked"]))
    dated.sort(key=lambda each: -each[0])
    return [requested for _, requested in dated[:MOST_NOTES]]


def explain_miss(store: ReferenceStore, requested: Mapping[str, Any], known: int) -> str:
    """One clause on why log-probs are missing: what differs from the most similar earlier run.

    Args:
        store: the store that lacks them.
        requested: what this run requests, its own note not yet written.
        known: how many of this run's pairs were found.
    """
    earlier = load_requests(store.folder)
    if store.num_corrupt:
        return f"{store.num_corrupt} damaged shards were set aside"
    if store.skipped_versions:
        return f"--ref_versions strict: {_listed(list(store.skipped_versions))}"
    if not earlier and not len(store):
        return _other_store(store)
    if not earlier:
        return "what filled this store is not noted"
    earlier = [each for each in earlier if each.get("name") == requested.get("name")]
    if not earlier:
        return f"no earlier run asked for {requested.get('name')} data"
    nearest = min(earlier, key=lambda each: len(_differences(each, requested)))
    differs = _differences(nearest, requested)
    if differs:
        return _listed(differs)
    if not len(store) or not known:
        return "an earlier run asked for the same and kept nothing"
    return "an earlier pass over the same data did not finish, or the rows themselves changed"


def _other_store(store: ReferenceStore) -> str:
    """One clause on how the most similar other store's reference differs from this one."""
    manifests = [_json(path) for path in store.root.glob(f"*/{MANIFEST}")]
    others = [
        manifest["identity"]
        for manifest in manifests
        if isinstance(manifest.get("identity"), dict) and manifest["identity"] != store.identity
    ]
    if not others:
        return "nothing was stored before"
    nearest = min((_differences(each, store.identity) for each in others), key=len)
    return f"a new reference: {_listed(nearest)}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[str]:
    """Name, former and present value of everything that differs or that one side lacks."""
    changes = []
    for name in (*now, *(name for name in before if name not in now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += _differences(old, new, f"{inside}{name}.")
        elif old != new:
            changes.append(f"{inside}{name} {_short(old)} -> {_short(new)}")
    return changes


def _listed(differs: list[str]) -> str:
    more = len(differs) - MOST_REASONS
    return ", ".join(differs[:MOST_REASONS]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    if value is None or isinstance(value, Mapping):
        return "none" if value is None else "set"
    text = str(value.value if isinstance(value, Enum) else value)
    if re.fullmatch("[0-9a-f]{64}", text):  # a sha256
        return text[:12]
    return text if len(text) <= 40 else "..." + text[-24:]


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_NOTE_BYTES + 1))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
