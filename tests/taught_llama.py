"""A tiny Llama that was taught the demo's language, and pairs of its own samples: one a session."""

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock

from fastdpo.demo.build import Demo, Recipe, make_demo
from tests.conftest import SHARED_FOLDER

# That of examples/walkthrough.ipynb, which then takes it as it lies.
RECIPE = Recipe(
    updates=250, texts_per_update=24, train_pairs=240, dev_pairs=60, prompts_per_batch=64
)


@cache
def taught_llama() -> Demo:
    """The first process that asks makes it, in about 8 s; the others wait and find it."""
    shared = Path(os.environ.get(SHARED_FOLDER) or mkdtemp(prefix="taught-llama-"))
    with FileLock(shared / "taught_llama.lock"):
        return make_demo(shared / "taught_llama", report=lambda line: None, recipe=RECIPE)
