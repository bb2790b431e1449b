"""Reading a YAML file of options, which may come from anywhere: no tags, no bombs, no second value.

Only what `yaml.safe_load` builds is accepted, keys of the file occur once, and what anchors and
aliases repeat is counted before anything is written out in full.
"""

import re
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 2**16
MAX_NESTING = 32
MAX_VALUES = 100_000
"""Scalars, lists and mappings of a file, each alias counted as all that it stands for."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which 1e-6 is a number, as in YAML 1.2 and in Python.

    YAML 1.1 wants a point in it. Options at the top are text to the command line's own reading
    anyway; this is for numbers inside mappings and lists.
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def load_yaml_config(path: Path) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty one.

    Raises:
        ValueError: the file is not YAML, no mapping, too large, or says something twice; the text
            names the file and, where there is one, the line.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"--config {path}: there is no such file; check the path")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: has more than {MAX_FILE_BYTES} bytes; a file of options is a page long"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        _check_nesting(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}
        _check(root, path)
        content = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    except (ValueError, OverflowError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}:") else f"{path}: {text}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, not options; write lines as beta: 0.1"
        )
    return {**content, **_top_level_text(root)}


def _top_level_text(root: yaml.MappingNode) -> dict[str, str]:
    """The options whose value is text: 12e4 may be a revision or a name."""
    return {
        key.value: value.value
        for key, value in root.value
        if key.tag.endswith(":str") and value.tag == "tag:yaml.org,2002:str"
    }


def _check_nesting(text: str, path: Path) -> None:
    """Refuse deep nesting before PyYAML builds it, in time that grows with the depth squared."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            line = event.start_mark.line + 1
            raise ValueError(f"{path}:{line}: is nested too deeply; options need three levels")


def _check(root: yaml.Node, path: Path) -> None:
    """Refuse keys that occur twice, and aliases that hold themselves or blow up."""
    sizes: dict[int, int] = {}
    opened: set[int] = set()

    def size(node: yaml.Node) -> int:
        where = f"{path}:{node.start_mark.line + 1}"
        if id(node) in opened:
            raise ValueError(f"{where}: an alias stands for something that it is a part of")
        if id(node) not in sizes:
            opened.add(id(node))
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                _reject_duplicate_keys(node, where)
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = list(node.value)
            sizes[id(node)] = 1 + sum(map(size, parts))
            opened.discard(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ValueError(
                f"{where}: stands for more than {MAX_VALUES:,} values, aliases counted; write "
                "options out"
            )
        return sizes[id(node)]

    size(root)


def _reject_duplicate_keys(node: yaml.MappingNode, where: str) -> None:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{where}: {key} is set twice; keep one")
