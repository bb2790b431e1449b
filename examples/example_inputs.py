"""The inputs of the DPO examples: the demo's tiny Llama and its pairs, or what you name.

Not an example itself. Without --model the demo is made in ./fastdpo-demo, once for all of them, in
about 30 s on two cores; `python -m fastdpo.train` makes the same one.
"""

import argparse
from pathlib import Path

from fastdpo.demo.build import make_demo


def parse(description, argv=None, **more):
    """The arguments that every example takes, and `more` of its own by name, with a default.

    A learning rate that is not given is 3e-4 for the tiny Llama; for a model that you name it is
    1e-5, as is usual for adapters.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; unset: the demo's tiny Llama")
    parser.add_argument("--dataset", help="file or hub id of preference pairs; unset: the demo's")
    parser.add_argument("--eval_dataset", help="held-out pairs; unset: --dataset, or the demo's")
    parser.add_argument("--output_dir", default="fastdpo-output/example")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--max_steps", type=int, default=30, help="updates")
    for name, default in more.items():
        kind = type(default[0] if isinstance(default, list) else default)
        several = "+" if isinstance(default, list) else None
        parser.add_argument(f"--{name}", type=kind, nargs=several, default=default)
    inputs = parser.parse_args(argv)
    if (inputs.model is None) != (inputs.dataset is None):
        parser.error("--model and --dataset belong together: pass both, or neither for the demo's")
    if inputs.model is None:
        demo = make_demo(Path("fastdpo-demo"), report=print)
        inputs.model, inputs.dataset = str(demo.model_dir), str(demo.train_file)
        inputs.eval_dataset = inputs.eval_dataset or str(demo.dev_file)
        inputs.learning_rate = inputs.learning_rate or 3e-4
    inputs.eval_dataset = inputs.eval_dataset or inputs.dataset
    inputs.learning_rate = inputs.learning_rate or 1e-5
    return inputs
