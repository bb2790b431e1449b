"""The names of bases: where an adapter's base lies now, and whether two names are one base."""

from pathlib import Path

from fastdpo.system import files


def require_base(name: str, adapter: str) -> None:
    """Refuse the base that an adapter names where it is a path and nothing lies there.

    Args:
        name: of the base, as the adapter's config has it: a folder or a hub id.
        adapter: the adapter's folder.

    Raises:
        ValueError: says what to pass.
    """
    if Path(name).expanduser().is_dir() or not looks_like_path(name):
        return
    if Path(name).is_absolute():
        where = "and there is no such folder on this machine"
    else:
        where = "relative to where it was trained, and there is no such folder here"
    raise ValueError(
        f"the adapter in {adapter} names its base {name}, {where}: pass the base as --model to "
        "evaluate, score or merge, or correct base_model_name_or_path in "
        f"{Path(adapter) / 'adapter_config.json'}."
    )


def looks_like_path(name: str) -> bool:
    """Return True if a name can be no hub id, which is one word, or two with a slash between."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_same_base(first: str, second: str) -> bool:
    """Return True if two names are one base: one folder, or folders of the same weight files."""
    if first == second:
        return True
    folders = [Path(name).expanduser() for name in (first, second)]
    if not all(folder.is_dir() for folder in folders):
        return False
    if folders[0].samefile(folders[1]):
        return True
    weights = [
        {path.name: path for path in sorted(folder.glob("*.safetensors"))} for folder in folders
    ]
    if not weights[0] or weights[0].keys() != weights[1].keys():
        return False
    pairs = [(path, weights[1][name]) for name, path in weights[0].items()]
    return all(a.stat().st_size == b.stat().st_size for a, b in pairs) and all(
        files.sha256_of(a) == files.sha256_of(b) for a, b in pairs
    )
