"""Files of models that others made: links stay inside, names are plain names."""

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard


def model_file(folder: Path, name: str) -> Path:
    """The path of a file in a model's folder, after a look at where its links lead.

    A link may lead to the folder itself or, as the hub's cache lays models out (`snapshots/COMMIT`
    beside `blobs`), to the blob store: what is merged or copied is published.

    Raises:
        FileNotFoundError: there is no such file, or it is no regular one.
        ValueError: a link leads elsewhere.
    """
    path, home = folder / name, folder.resolve()
    target, homes = path.resolve(), [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(each) for each in homes):
        raise ValueError(
            f"{path} is a link to {target}, outside of the model's folder, and a merge would "
            "publish what it leads to: put the file itself there."
        )
    if not target.is_file():
        raise FileNotFoundError(f"{path} is missing or no regular file")
    return path


def are_plain_names(names: Any) -> TypeGuard[Sequence[str]]:
    """Tell whether this is a list of file names without any path, on any system."""
    return isinstance(names, list | tuple) and all(map(_is_plain, names))


def _is_plain(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return PureWindowsPath(name).name == name and "\0" not in name
