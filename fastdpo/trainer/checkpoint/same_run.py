"""A check that a checkpoint belongs to the run that resumes from it."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastdpo.system import ranks
from fastdpo.trainer.checkpoint.errors import CheckpointError


def require_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Refuse to resume under settings that would make the run another one.

    A setting that one side does not know, since another version of fastdpo or of transformers
    wrote it, is no difference: what would be read otherwise has another format.

    Args:
        saved: the settings in the checkpoint, nested to any depth.
        current: the settings of this run.
        allowed: names that may differ, as the refusal spells them ("loss.beta"), by their last
            part ("beta"), or all that begin with one ("loss").

    Returns:
        A line for each difference that was allowed.

    Raises:
        CheckpointError: lists every other setting that differs, with both values; or a name in
            `allowed` is none.
    """
    names = list(_flat(saved) | _flat(current))
    for name in allowed:
        if not any(_covers(name, each) for each in names):
            raise CheckpointError(
                f"--allow_config_change names {name!r}, and a run is described by "
                f"{', '.join(names)}: name one of these."
            )
    lines = {
        name: f"{name}: the checkpoint has {_shown(before)}, this run {_shown(now)}"
        for name, before, now in _differences(saved, current)
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


def require_same_on_ranks(current: Mapping[str, Any]) -> None:
    """Refuse ranks that would each train something else.

    Args:
        current: the settings of this rank's run, nested to any depth.

    Raises:
        ValueError: lists what is not the first rank's.
    """
    if ranks.count() == 1:
        return
    first, *others = ranks.gathered([current])
    lines = [
        f"{name}: rank {rank} has {_shown(theirs)}, rank 0 {_shown(ours)}"
        for rank, other in enumerate(others, 1)
        for name, ours, theirs in _differences(first, other)
    ]
    if lines:
        raise ValueError(
            "the processes of this run do not train the same:\n  "
            + "\n  ".join(lines)
            + "\nGive every process the whole data set, the same model and the same options; the "
            "pairs of an update are dealt out to them later."
        )


def _covers(allowed: str, name: str) -> bool:
    return f".{name}".endswith(f".{allowed}") or name.startswith(f"{allowed}.")


def _differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name, saved and present value of each setting that both sides know and that differs."""
    for key, before in saved.items():
        if key not in current:
            continue
        now = current[key]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif _as_json(before) != _as_json(now):
            yield f"{prefix}{key}", before, now


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by their nested names joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in description.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_json(value: Any) -> Any:
    """A value as JSON reads it back: tuples are lists."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(_as_json(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
