"""What no line of the package may do: run what it reads, or write past `fastdpo.system.files`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("fastdpo", "kernels") for path in (ROOT / folder).rglob("*.py")
)

RUN_WHAT_THEY_READ = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib",
}  # fmt: skip
"""Modules that nobody imports."""

CALLS = {"eval", "exec", "compile", "os.system", "torch.load", "torch.save"} | {
    f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "full_load", "Loader")
}
WRITES = {
    "os.replace", "os.rename", "os.remove", "os.unlink", "os.mkdir", "os.makedirs", "os.rmdir",
    "os.utime", "os.truncate", "os.open", "os.link", "os.symlink", "shutil.rmtree", "shutil.move",
    "shutil.copy", "shutil.copyfile", "shutil.copytree", "np.save", "numpy.save",
}  # fmt: skip
METHODS = {"write_text", "write_bytes", "unlink", "mkdir", "rmdir", "symlink_to", "hardlink_to"}
LIBRARY_WRITERS = {"save_file", "save_pretrained", "save_to_disk", "to_parquet"}
"""Allowed as what `files.call_writer` is given."""


def faults(source: str, name: str, writes_itself: bool = False) -> list[str]:
    """What a source does that it must not, with its lines."""
    tree = ast.parse(source)
    lent = {
        inner
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and dotted(call.func) in ("files.call_writer", "call_writer")
        for inner in ast.walk(call)
    }
    found = []
    for node in ast.walk(tree):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            bad = {module.split(".")[0] for module in modules} & RUN_WHAT_THEY_READ
            found += [f"{line} imports {module}" for module in bad]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            given = isinstance(node.value, ast.Constant) and node.value.value
            found += [f"{line} trusts remote code"] if given else []
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        last = called.rpartition(".")[2]
        if called in CALLS:
            found.append(f"{line} calls {called}")
        if writes_itself or called.startswith("files."):
            continue
        if called in WRITES or ("." in called and last in METHODS) or opens_to_write(node, last):
            found.append(f"{line} writes by {called}: use fastdpo.system.files")
        if last in LIBRARY_WRITERS and node not in lent:
            found.append(f"{line} calls {called} outside files.call_writer")
    return found


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def opens_to_write(call: ast.Call, last: str) -> bool:
    modes = [*call.args[:2], *(word.value for word in call.keywords if word.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return last == "open" and any(
        isinstance(text, str) and set(text) <= set("rwxabt+") and set(text) & set("wxa+")
        for text in texts
    )


LENT = {
    "fastdpo/ref_cache/archive.py": ("tarfile.open",),
    "fastdpo/evaluation/scored_rows.py": ("path.open",),
}
"""Functions that are handed to `files.call_writer` or `files.write_atomically` by name."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads_or_writes_past_files(path):
    name = str(path.relative_to(ROOT))
    found = faults(path.read_text(encoding="utf-8"), name, name == "fastdpo/system/files.py")
    found = [fault for fault in found if not any(each in fault for each in LENT.get(name, ()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=x)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "shutil.rmtree(path)",
        "os.replace(a, b)",
        "(folder / 'a').write_text('x')",
        "path.unlink()",
        "open(path, 'w')",
        "path.open('ab')",
        "path.open(mode='r+')",
        "save_file(tensors, path)",
        "model.save_pretrained(folder)",
    ],
)
def test_what_is_forbidden_is_found(source):
    assert len(faults(source, "x")) == 1


def test_what_is_allowed_passes():
    for source in (
        "files.call_writer(path, lambda path: save_file(tensors, path))",
        "files.write_text(path, text)",
        "yaml.safe_load(text)",
        "path.open('rb')",
        "open(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=options.trust_remote_code)",
    ):
        assert faults(source, "x") == []


def test_remote_code_is_off_by_default_and_weights_are_safetensors_only():
    from inspect import signature

    from fastdpo.modeling import loading
    from fastdpo.options import ModelOptions

    assert ModelOptions().trust_remote_code is False
    for load in (loading.load_model, loading.load_tokenizer):
        assert signature(load).parameters["trust_remote_code"].default is False
    assert '"use_safetensors": True' in Path(loading.__file__).read_text()
