"""Runs the demo: makes the model and its pairs, aligns it, and shows what changed."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdpo.options import DataOptions, ModelOptions
from fastdpo.system import ranks
from fastdpo.system.console import print_line
from fastdpo.trainer.from_options import run

if TYPE_CHECKING:
    from fastdpo.evaluation.evaluate_pairs import Evaluation


def demonstrate(folder: Path) -> "Evaluation":
    """Make a tiny model and pairs in `folder`, align the model, and print the change."""
    from fastdpo.batching import PairGroups
    from fastdpo.config import DPOConfig
    from fastdpo.demo.build import make_demo
    from fastdpo.evaluation.evaluate_pairs import (
        Completion,
        evaluate_scored,
        generate_completions,
        score_both,
    )
    from fastdpo.modeling.loading import load_tokenizer

    print_line(
        "No arguments: the demo. It makes a tiny Llama, teaches it a small language, lets it write"
    )
    print_line("answers, and aligns it with preferences between them. --help shows the options.\n")
    ranks.join()
    demo = ranks.first_does(lambda: make_demo(folder, report=print_line))
    model = ModelOptions(model_name_or_path=str(demo.model_dir), lora=True)
    data = DataOptions(dataset_name=str(demo.train_file), eval_dataset=str(demo.dev_file))
    config = DPOConfig(
        str(folder / "adapter"),
        per_device_train_batch_size=32,
        num_train_epochs=2,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        activation_checkpointing=False,
        ref_cache=str(folder / "reference"),
    )
    trainer = run(model, data, config)
    tokenizer = load_tokenizer(str(demo.model_dir))
    prompt = np.array(tokenizer(demo.prompt).input_ids)
    assert isinstance(trainer.eval_groups, PairGroups), "one held-out set"
    policy, reference = score_both(
        trainer.policy, trainer.eval_groups, micro_batch_tokens=trainer.layout.micro_batch_tokens
    )
    completion = Completion(
        demo.prompt,
        *generate_completions(
            trainer.policy, tokenizer, [prompt], max_new_tokens=64, reference=True
        ),
        *generate_completions(trainer.policy, tokenizer, [prompt], max_new_tokens=64),
    )
    evaluation = evaluate_scored(policy, reference, beta=config.beta, completions=[completion])
    print_line(f"\n{evaluation.describe()}")
    print_line(
        "\nBefore training policy and reference are one: largest margin of the first update "
        f"{trainer.first_update_margin} nats."
    )
    return evaluation
