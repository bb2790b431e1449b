"""What the wheel holds, and what the checkout shows: no package `kernels`, no tests shipped."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_kernels_is_no_package():
    """With an __init__.py it would stand in for Hugging Face's, and no model would load."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "tests" / "kernels").exists()
    spec = importlib.machinery.PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is None or spec.origin is None


def test_the_wheel_holds_only_our_two_packages(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("fastdpo", "kernels"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "bench", "examples", "tests/data/corpus"):  # none of them may be shipped
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").touch()
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    (project / "out").mkdir()
    python(build, project)
    (wheel,) = (project / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastdpo", "fastdpo_kernels"}
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    wanted = {
        str(path.relative_to(start))
        for start, package in ((ROOT, "fastdpo"), (ROOT / "kernels", "fastdpo_kernels"))
        for path in (start / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "model_configs"
    }
    assert shipped == wanted
    assert "fastdpo/planner/model_configs/meta-llama--Llama-2-7b-hf.json" in shipped


def test_transformers_loads_a_model_from_the_checkout():
    code = """
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert python(code, ROOT).strip() == "LlamaForCausalLM"


def test_importing_the_kernels_imports_little():
    code = """
import sys
import fastdpo_kernels
heavy = {"triton", "transformers", "bitsandbytes", "fastdpo"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(code, ROOT).strip() == "[]"
