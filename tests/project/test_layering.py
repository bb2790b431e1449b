"""Imports point one way: the map of rooms, kept by walking the syntax trees of all sources.

Imports inside functions and under TYPE_CHECKING count too: a direction is a direction.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = (
    ("version", "options", "system"),
    ("config", "data", "losses"),
    ("batching",),
    ("modeling",),
    ("planner", "ref_cache", "evaluation", "merging", "cli"),
    ("trainer",),
    ("demo",),
    ("__init__", "train", "evaluate", "score", "merge", "plan", "reference"),
)
"""The 22 rooms floor by floor, from the ground up.

A room imports itself and the rooms of lower floors, never another one of its own floor: so no two
rooms can import each other, lazily or not, and none stands in a circle of several.
"""

LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT_KERNELS = ("modeling", "ref_cache", "trainer")
FOREIGN = ("bench", "tests", "examples")
NAMELESS = ("utils", "helpers", "common", "misc", "util", "helper")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    in_function: bool
    relative: bool


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every module that a source names in an import, absolute, with where it stands."""
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(name.name, child.lineno, inside, False)
            elif isinstance(child, ast.ImportFrom):
                start = child.module or ""
                if child.level:
                    base = package.split(".")[: len(package.split(".")) - child.level + 1]
                    start = ".".join([*base, *([start] if start else [])])
                for name in child.names:
                    target = f"{start}.{name.name}"
                    yield Import(target, child.lineno, inside, child.level > 0)
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


def room_of(module: str) -> str:
    """`fastdpo.data.reading.read_rows` lies in `data`; `fastdpo` and its names in `__init__`."""
    room = module.split(".")[1] if "." in module else "__init__"
    file, folder = ROOT / "fastdpo" / f"{room}.py", ROOT / "fastdpo" / room
    return room if room in LEVELS or file.exists() or folder.is_dir() else "__init__"


def package_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of `fastdpo`."""
    room = room_of(module)
    if room not in LEVELS:
        return [
            f"{module}: the room {room!r} is not on the map: put it into FLOORS of "
            "tests/project/test_layering.py, and into section 2 of docs/design.md"
        ]
    faults = []
    for found in imports_of(source, module, is_package):
        top = found.target.split(".")[0]
        where = f"{module}:{found.line} imports {found.target}"
        if top == "fastdpo":
            target = room_of(found.target)
            if target not in LEVELS:
                faults.append(
                    f"{where}, a room that is not on the map of tests/project/test_layering.py"
                )
            elif not _may_import(room, target):
                faults.append(f"{where}: {room} may not import {target}")
        elif top == "fastdpo_kernels" and room not in MAY_IMPORT_KERNELS:
            faults.append(f"{where}: only {', '.join(MAY_IMPORT_KERNELS)} may import the kernels")
        elif top in (*FOREIGN, "kernels"):
            faults.append(f"{where}: nothing imports {top}")
        elif room in ("version", "options") and not _is_standard(top):
            faults.append(f"{where}: {room} imports only the standard library")
    return faults


def _may_import(room: str, target: str) -> bool:
    return room == target or LEVELS[target] < LEVELS[room]


def kernel_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of `fastdpo_kernels`."""
    jit_file = module.rpartition(".")[2].startswith("_triton")
    faults = []
    for found in imports_of(source, module, is_package):
        top = found.target.split(".")[0]
        where = f"{module}:{found.line} imports {found.target}"
        if found.relative:
            if not found.target.startswith("fastdpo_kernels."):
                faults.append(f"{where}: a relative import must stay inside the package")
            elif "._triton" in found.target and not (found.in_function or jit_file):
                faults.append(f"{where}: jit code is imported inside functions only")
        elif top in ("triton", "bitsandbytes"):
            if not (found.in_function or (jit_file and top == "triton")):
                faults.append(f"{where}: {top} is imported inside functions only")
        elif top == "fastdpo_kernels":
            faults.append(f"{where}: import the package's own modules relatively")
        elif top != "torch" and not _is_standard(top):
            faults.append(f"{where}: kernels import torch and the standard library, lazily triton")
    return faults


def _is_standard(top: str) -> bool:
    return top in sys.stdlib_module_names


def sources(folder: Path, start: Path) -> list[tuple[str, Path]]:
    """Module name and path of every Python file below `folder`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(start).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def faults_of(check, folder: Path, start: Path) -> list[str]:
    return [
        fault
        for module, path in sources(folder, start)
        for fault in check(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]


def test_fastdpo_imports_one_way():
    faults = faults_of(package_faults, ROOT / "fastdpo", ROOT)
    assert not faults, "\n".join(faults)


def test_the_map_names_what_there_is():
    """Nine files and thirteen folders: every room at the top is on the map, and none is missing.

    `python -m fastdpo.COMMAND` finds a file, so no folder is a command with a `__main__`.
    """
    assert len(LEVELS) == sum(map(len, FLOORS)) == 22, "a room stands on one floor"
    top = (ROOT / "fastdpo").iterdir()
    rooms = {path.stem for path in top if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == set(LEVELS)
    assert not list((ROOT / "fastdpo").rglob("__main__.py"))


def test_kernels_import_only_torch():
    start = ROOT / "kernels"
    faults = faults_of(kernel_faults, start / "fastdpo_kernels", start)
    assert not faults, "\n".join(faults)


def test_nothing_imports_bench_tests_or_examples():
    for folder in ("bench", "examples"):
        for module, path in sources(ROOT / folder, ROOT):
            for found in imports_of(path.read_text(encoding="utf-8"), module):
                top = found.target.split(".")[0]
                wrong = top in FOREIGN and not (top == folder == "bench")
                assert not wrong, f"{path}:{found.line} imports {found.target}"


def test_every_file_has_a_telling_name():
    for folder in ("fastdpo", "kernels", "bench", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names = {part.removeprefix("test_").lstrip("_") for part in parts}
            assert not names & set(NAMELESS), f"{path}: name it after what it does"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdpo.data.pairs", "from fastdpo.batching import Segment"),
        ("fastdpo.data.pairs", "from ..modeling import head"),
        ("fastdpo.batching.pack", "def f():\n    from fastdpo.trainer import DPOTrainer"),
        ("fastdpo.modeling.head", "if TYPE_CHECKING:\n    from fastdpo.ref_cache import store"),
        ("fastdpo.ref_cache.store", "import fastdpo.trainer"),
        ("fastdpo.ref_cache.store", "from fastdpo import system, trainer"),
        ("fastdpo.trainer", "from fastdpo.train import main"),
        ("fastdpo.trainer", "from fastdpo import DPOConfig"),
        ("fastdpo.train", "from fastdpo import DPOConfig"),
        ("fastdpo.options", "from fastdpo.config import DPOConfig"),
        ("fastdpo.options", "import torch"),
        ("fastdpo.system.files", "from fastdpo.losses import LOSSES"),
        ("fastdpo.config", "from fastdpo.data import Pair"),
        ("fastdpo.config", "from fastdpo.losses import LOSSES"),
        ("fastdpo.losses", "from fastdpo.trainer.metrics import MetricSums"),
        ("fastdpo.data.pairs", "from fastdpo.losses import LOSSES"),
        ("fastdpo.planner.plan", "def f():\n    from fastdpo.ref_cache import store"),
        ("fastdpo.train", "from fastdpo.evaluate import EvaluationOptions"),
        ("fastdpo.losses", "import fastdpo_kernels"),
        ("fastdpo.data.pairs", "from fastdpo_kernels import linear_logprobs"),
        ("fastdpo.train", "from fastdpo_kernels import linear_logprobs"),
        ("fastdpo.trainer", "from bench import kernel"),
        ("fastdpo.trainer", "import tests.conftest"),
        ("fastdpo.trainer", "import kernels.fastdpo_kernels"),
    ],
)
def test_a_broken_direction_is_found(module, source):
    assert len(package_faults(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastdpo_kernels._torch", "import fastdpo.options"),
        ("fastdpo_kernels._torch", "from transformers import AutoModel"),
        ("fastdpo_kernels._torch", "import numpy"),
        ("fastdpo_kernels._function", "import triton"),
        ("fastdpo_kernels._function", "import bitsandbytes"),
        ("fastdpo_kernels._function", "from ._triton import kernel"),
        ("fastdpo_kernels._function", "from . import _triton"),
        ("fastdpo_kernels._function", "from fastdpo_kernels import _torch"),
        ("fastdpo_kernels._function", "from ..other import thing"),
    ],
)
def test_a_broken_kernel_import_is_found(module, source):
    assert len(kernel_faults(source, module)) == 1


def test_what_is_allowed_passes():
    for module, source in (
        ("fastdpo.trainer", "from fastdpo.trainer import checkpoint\nimport fastdpo.data.pairs"),
        ("fastdpo.trainer", "from fastdpo_kernels import linear_logprobs\nimport transformers"),
        ("fastdpo.modeling.logprobs", "from . import head\nfrom .head import get_lm_head"),
        ("fastdpo.config", "from fastdpo.options import PreferenceOptions"),
        ("fastdpo.train", "from fastdpo.cli.parser import parse"),
        ("fastdpo.reference", "from fastdpo.cli.parser import parse"),
        (
            "fastdpo.trainer.checkpoint.folders",
            "from fastdpo.system import files\nfrom fastdpo.config import DPOConfig",
        ),
    ):
        assert package_faults(source, module) == []
    for module, source in (
        ("fastdpo_kernels._function", "import math\nimport torch\nfrom . import _torch"),
        ("fastdpo_kernels._function", "def f():\n    import triton\n    from . import _triton"),
        ("fastdpo_kernels._triton", "import triton\nimport triton.language as tl"),
    ):
        assert kernel_faults(source, module) == []


def test_a_new_room_is_told_to_join_the_map(tmp_path, monkeypatch):
    (tmp_path / "fastdpo" / "attic").mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (fault,) = package_faults("import torch", "fastdpo.attic.box")
    assert "'attic' is not on the map" in fault
    assert "tests/project/test_layering.py" in fault
    (fault,) = package_faults("from fastdpo.attic import box", "fastdpo.trainer")
    assert "not on the map" in fault
