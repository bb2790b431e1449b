"""A check that a checkpoint belongs to the run that resumes from it."""

from collections.abc import Collection, Mapping
from typing import Any

from fastdpo.trainer.checkpoint.errors import CheckpointError

_ABSENT = object()


def require_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Refuse to resume under settings that would make the run another one.

    Args:
        saved: the settings in the checkpoint, nested to any depth.
        current: the settings of this run.
        allowed: names that may differ, as the refusal spells them, or all that begin with one
            ("model" allows "model.dtype").

    Returns:
        A line for each difference that was allowed.

    Raises:
        CheckpointError: lists every other setting that differs, with both values; or a name in
            `allowed` is none.
    """
    before, now = _flat(saved), _flat(current)
    names = list(before | now)
    for name in allowed:
        if not any(_covers(name, each) for each in names):
            raise CheckpointError(
                f"--allow_config_change names {name!r}, and a run is described by "
                f"{', '.join(names)}: name one of these."
            )
    lines = {
        name: f"{name}: the checkpoint has {_shown(before, name)}, this run {_shown(now, name)}"
        for name in names
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    }
    refused = [n for n in lines if not any(_covers(each, n) for each in allowed)]
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another run:\n  "
            + "\n  ".join(lines[name] for name in refused)
            + "\nResume with the same settings, start anew in another output_dir, or, to go on "
            f"all the same, pass --allow_config_change {' '.join(refused)}."
        )
    return list(lines.values())


def _covers(allowed: str, name: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by their nested names joined by dots, tuples as lists, which JSON reads back."""
    flat: dict[str, Any] = {}
    for key, value in description.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
