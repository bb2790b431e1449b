"""The pages of docs/: every command and piece of Python is run, every output and name is true.

A block's info string says what happens to it:
    bash, python       run in turn, in a folder with my-model, pairs.jsonl and held_out.jsonl
    bash no-run        parsed only; its first line is `# needs ` and one of `NEEDS`
    bash ranks         parsed here, and run by as many processes in tests/trainer/test_ranks.py
    yaml               an options file: one update is trained with it
    json               a row of data, given to the reader
    text output        what the block before it printed, to the letter
    text real          what it printed with a real model, which the tests do not have: shown only
`python -m tests.project.test_docs` writes the outputs and the table of options as they are now.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from fastdpo import train
from fastdpo.config import DPOConfig
from fastdpo.data import PreferenceRow, rows_from
from fastdpo.evaluate import EvaluationOptions
from fastdpo.losses import LOSSES
from fastdpo.merge import MergingOptions
from fastdpo.options import ComparisonOptions, DataOptions, ModelOptions
from fastdpo.plan import PlanningOptions
from fastdpo.reference import StoreOptions
from fastdpo.score import ScoringOptions
from fastdpo.system import files
from fastdpo.train import TrainOptions
from tests.cli.test_trl_options import as_markdown
from tests.taught_llama import taught_llama

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = (
    "a model of the hub", "a GPU", "several GPUs", "a network", "an installation of llama.cpp",
    "an installation of Ollama", "an installation of vLLM",
)  # fmt: skip
LAUNCHERS = ("torchrun", "accelerate")
ACTIONS = ("make_trainer", "run", "demonstrate")
"""What a command calls once its options are parsed."""

OPTION_KINDS = (
    ModelOptions, DataOptions, DPOConfig, TrainOptions, ComparisonOptions, EvaluationOptions,
    ScoringOptions, MergingOptions, PlanningOptions, StoreOptions,
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text, and where the text lies in the page."""

    info: str
    text: str
    start: int
    end: int


def blocks_of(page):
    fenced = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [Block(m[1].strip(), m[2], m.start(2), m.end(2)) for m in fenced.finditer(page)]


class Parsed(Exception):
    """Raised in the place of the work, once the options are parsed."""


# Running blocks


def run_command(line):
    """One line of a shell, in this process."""
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"], f"not run by anything: {line}"
    main_of(words[2])(words[3:])


def parse_command(line):
    """The options of a command exist and fit together; nothing is loaded."""
    words = shlex.split(line)
    if words[0] in LAUNCHERS:
        words = ["python", *words[words.index("-m") :]]
    if words[:2] != ["python", "-m"] or not words[2].startswith("fastdpo."):
        return
    module = importlib.import_module(words[2])
    actions = [name for name in ACTIONS if hasattr(module, name)]
    if not actions:  # plan: it loads nothing
        module.main(words[3:])
        return
    with contextlib.ExitStack() as patched:
        for name in actions:
            patched.enter_context(mock.patch.object(module, name, side_effect=Parsed))
        with pytest.raises(Parsed):
            module.main(words[3:])


def main_of(name):
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    return module.main


def as_read(row):
    """What becomes of a row of data, in words."""
    descriptions: list[str] = []
    lines = []
    for _, preferences in rows_from([row], "row").preferences(descriptions):
        for preference in preferences:
            lines += [
                f"{name:10}{shown(getattr(preference, name))}"
                for name in ("prompt", "chosen", "rejected")
            ]
    return "\n".join([descriptions[0], *lines]) + "\n"


def shown(part: PreferenceRow | str | list):
    if isinstance(part, str):
        return repr(part)
    return ", ".join(f"{turn['role']} {turn['content']!r}" for turn in part)


def lines_of(text):
    """Commands of a block, continuations joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def outputs_of(page):
    """Run the blocks of a page in the current folder: a list of (output block, what it must be)."""
    namespace, printed, found = {"__name__": "a_page"}, "", []
    for number, block in enumerate(blocks_of(page)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if block.info == "bash":
                for line in lines_of(block.text):
                    run_command(line)
            elif block.info == "python":
                exec(compile(block.text, f"block {number}", "exec"), namespace)
            elif block.info == "yaml":
                Path("run.yaml").write_text(block.text)
                train.main(["--config", "run.yaml", "--max_steps", "1"])
            elif block.info == "json":
                said.write(as_read(json.loads(block.text)))
            elif block.info == "text real":
                continue
            elif block.info == "bash ranks":
                for line in lines_of(block.text):
                    assert shlex.split(line)[0] in LAUNCHERS, line
                    parse_command(line)
            elif block.info == "bash no-run":
                needs = block.text.splitlines()[0].removeprefix("# needs ")
                assert needs in NEEDS, f"say in the first line what it needs: {block.text}"
                for line in lines_of(block.text):
                    parse_command(line)
            else:
                assert block.info == "text output", f"an unknown kind of block: {block.info!r}"
                found.append((block, printed))
        printed = "".join(f"{line.rstrip()}\n" for line in said.getvalue().splitlines())
    return found


@contextlib.contextmanager
def a_workplace(folder):
    """The folder that the pages speak of, as the current one."""
    demo, before = taught_llama(), Path.cwd()
    os.chdir(folder)
    cache = {"FASTDPO_CACHE": str(Path(folder) / "cache"), "NO_COLOR": "1"}
    try:
        Path("my-model").symlink_to(demo.model_dir)
        Path("examples").symlink_to(ROOT / "examples")
        rows = demo.train_file.read_text().splitlines()[:24]
        Path("pairs.jsonl").write_text("\n".join(rows))
        Path("held_out.jsonl").write_text("\n".join(demo.dev_file.read_text().splitlines()[:8]))
        names = {"prompt": "context", "chosen": "good", "rejected": "bad"}
        renamed = [{names[k]: v for k, v in json.loads(row).items()} for row in rows]
        Path("renamed.jsonl").write_text("\n".join(map(json.dumps, renamed)))
        with mock.patch.dict(os.environ, cache):
            yield
    finally:
        os.chdir(before)


# The tests


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path):
    with a_workplace(tmp_path):
        for block in blocks_of((ROOT / "README.md").read_text()):
            if block.info == "python":
                exec(compile(block.text, "README.md", "exec"), {"__name__": "a_page"})
        assert Path("out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_does_as_it_says(path, tmp_path):
    with a_workplace(tmp_path):
        found = outputs_of(path.read_text(encoding="utf-8"))
    for block, output in found:
        assert block.text == output, (
            f"run python -m tests.project.test_docs, which writes outputs:\n{output}"
        )


def test_the_readmes_commands_parse():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = "\n".join(block.text for block in blocks_of(text))
    commands = [line.split("#")[0] for line in lines_of(fenced) if "python -m fastdpo." in line]
    assert len(commands) >= 2
    for line in commands:
        parse_command(line)


def test_the_options_of_trl_are_in_its_page():
    page = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "run python -m tests.project.test_docs, which writes the table"


def test_every_loss_has_its_row():
    page = (ROOT / "docs" / "how-dpo-works.md").read_text(encoding="utf-8")
    rows = page.split("| loss_type | formula | when |")[1].splitlines()
    named = {name for row in rows if row.startswith("| ") for name in row.split("|")[1].split(", ")}
    assert {name.strip() for name in named} == set(LOSSES)


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_what_a_page_names_exists(path):
    """Links, files, tests and options."""
    page = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (path.parent / link).exists(), f"{link} is gone"
    for name in re.findall(r"`((?:examples|tests|bench|kernels|fastdpo)/[\w./*-]+)", page):
        assert list(ROOT.glob(name.rstrip("."))), f"{name} is gone"
    assert not re.search(r"`test_\w+\.py", page), "tests are named with their folders"
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", page):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in tests, f"{file}::{test} is gone"
    prose = page
    for block in blocks_of(page):
        prose = prose.replace(block.text, "")
    named = {name for code in re.findall(r"`([^`\n]+)`", prose) for name in options_in(code)}
    assert named <= known_options(), f"no such option: {sorted(named - known_options())}"


def options_in(code):
    return re.findall(r"(?:^|\s)--(\w+)", code)


def known_options():
    names = {entry.name for kind in OPTION_KINDS for entry in fields(kind)}
    aliases = {
        alias.lstrip("-")
        for kind in OPTION_KINDS
        for entry in fields(kind)
        for alias in entry.metadata.get("aliases", ())
    }
    launchers = {"nproc_per_node", "num_processes", "multi_gpu"}
    return names | aliases | launchers | {"config", "help", "help_all", "version", "quick"}


def test_every_page_is_in_the_table_of_pages():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in PAGES:
        assert path.name == "README.md" or f"({path.name})" in index


def test_bench_rows_that_pages_name_exist():
    """Every time and peak that README or a page states is a row that was measured."""
    rows = (ROOT / "bench" / "results" / "rows.jsonl").read_text(encoding="utf-8")
    known = {json.loads(line)["id"] for line in rows.splitlines()}
    for path in [*PAGES, ROOT / "README.md"]:
        named = set(re.findall(r"`([a-z]+-[0-9a-f]{12})`", path.read_text(encoding="utf-8")))
        assert named <= known, f"{path.name}: no such row: {sorted(named - known)}"


def test_the_glossary_has_thirty_words_and_names_that_exist():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 30
    for _, _, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in words_of_sources(), f"{name} is in no source"


def test_what_has_moved_is_where_the_changelog_says():
    """Of what is not released yet: later moves are listed from the place that users know."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## [Unreleased]")[1]
    moved = re.findall(
        r"^\| (`fastdpo.*?) \| (.*?) \| (.*?)\|$", text.split("\n## [")[0], re.MULTILINE
    )
    assert len(moved) > 50
    for was, now, renamed in moved:
        for module in re.findall(r"`([\w.]+)`", was if now == "the same" else now):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").exists() or place.is_dir(), f"{module} is gone"
        for name in re.findall(r"-> `(\w+)`", renamed):
            assert name in words_of_sources(), f"{name} is in no source"


@cache
def words_of_sources():
    sources = (ROOT / "fastdpo").rglob("*.py")
    return {word for path in sources for word in re.findall(r"\w+", path.read_text("utf-8"))}


def test_pre_commit_runs_the_ruff_of_make_lint():
    pinned = re.search(r"ruff==([\d.]+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert f"rev: v{pinned[1]}\n" in hooks or f"rev: v{pinned[1]} " in hooks


def test_wrong_pages_are_noticed(tmp_path):
    wrong = (
        "```bash\npython -m fastdpo.plan --model my-model --gpo 24GiB\n```\n",
        "```bash no-run\n# needs luck\npython -m fastdpo.train\n```\n",
        "```bash no-run\n# needs a GPU\npython -m fastdpo.train --model m --lerning_rate 1\n```\n",
        "```python\nassert 1 == 2\n```\n",
        "```sh\necho\n```\n",
        '```json\n{"prompt": "a"}\n```\n',
    )
    with a_workplace(tmp_path):
        for page in wrong:
            with pytest.raises((SystemExit, AssertionError, ValueError)):
                outputs_of(page)
        ((block, output),) = outputs_of("```python\nprint(1)\n```\n```text output\n2\n```\n")
        assert (block.text, output) == ("2\n", "1\n")


# Writing outputs


def write_outputs():
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, a_workplace(folder):
            found = outputs_of(page)
        for block, output in reversed(found):
            page = page[: block.start] + output + page[block.end :]
        if path.stem == "coming-from-trl":
            heading = "| Option of trl.DPOConfig |"
            page = page.split(heading)[0].rstrip("\n") + f"\n\n{as_markdown()}\n"
        files.write_text(path, page)
        sys.stdout.write(f"{path.name}: {len(found)} outputs\n")


if __name__ == "__main__":
    write_outputs()
