"""A tiny Llama that was taught the demo's language, and pairs of its own samples: one a session."""

import tempfile
from functools import cache
from pathlib import Path

from fastdpo.demo.build import Demo, Recipe, make_demo

# That of examples/walkthrough.ipynb, which then takes it as it lies.
RECIPE = Recipe(
    updates=250, texts_per_update=24, train_pairs=240, dev_pairs=60, prompts_per_batch=64
)
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # gone when the session ends


@cache
def taught_llama() -> Demo:
    """Makes it when first asked for, in about 12 s."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="taught-llama-"))
    return make_demo(Path(_FOLDERS[0].name), report=lambda line: None, recipe=RECIPE)
