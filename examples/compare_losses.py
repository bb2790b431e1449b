"""The built-in losses beside each other: same start, same pairs, one stored reference.

    python examples/compare_losses.py                    # the demo's tiny Llama, 35 s on two cores
    python examples/compare_losses.py --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl \
        --losses sigmoid ipo apo_zero sigmoid+sft

Losses joined by + are added up. docs/how-dpo-works.md has the formulas, `--help` all names. Their
scales differ, so compare what comes out of them: accuracy, and which way the chosen answers went.
"""

from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_held_out, read_rows

LOSSES = ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "simpo"]
LOSSES += ["sigmoid+sft"]
EXTRA = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}}
EXTRA |= {"ipo": {"beta": 0.5}, "sigmoid_norm": {"beta": 5.0}, "simpo": {"beta": 2.5}}  # per token


def train(name, inputs):
    """Held-out metrics before and after training with one loss."""
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            f"{inputs.output_dir}/{name}",
            loss_type=name.split("+"),
            learning_rate=3 * inputs.learning_rate,  # much, so that the difference shows
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
            **EXTRA.get(name, {}),
        ),
        train_dataset=read_rows(inputs.dataset),
        eval_dataset=read_held_out(inputs.eval_dataset),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate()


def main(argv=None):
    inputs = parse(__doc__, argv, losses=LOSSES)
    results = {name: train(name, inputs) for name in inputs.losses}
    columns = ("loss before", "after", "chosen logp", "rejected logp", "logp margin")
    print(f"\n{'loss_type':16}" + "".join(f"{column:>15}" for column in columns))
    for name, (before, after) in results.items():
        moved = [
            after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"]
            for side in ("chosen", "rejected")
        ]
        values = (before["eval_loss"], after["eval_loss"], *moved, moved[0] - moved[1])
        print(f"{name:16}" + "".join(f"{value:15.4f}" for value in values))
    return results


if __name__ == "__main__":
    main()
