"""Evaluate on held-out pairs: accuracy, margins, perplexity, and both models' answers side by side.

    python examples/evaluate_held_out.py                 # the demo's tiny Llama, 9 s on two cores
    python examples/evaluate_held_out.py --model Qwen/Qwen3-0.6B --adapter out --dataset dev.jsonl

The command does the same: python -m fastdpo.evaluate --adapter out --dataset dev.jsonl. Without
--adapter one is trained first. The reference is the model with the adapter off.
"""

from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_rows
from fastdpo.evaluate import EvaluationOptions, run
from fastdpo.options import ComparisonOptions, DataOptions, ModelOptions, TokenizationOptions


def train(inputs):
    """The folder of a new adapter."""
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            inputs.output_dir,
            learning_rate=inputs.learning_rate,
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
        ),
        train_dataset=read_rows(inputs.dataset),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return inputs.output_dir


def main(argv=None):
    inputs = parse(__doc__, argv, adapter="", beta=0.1)
    evaluation = run(
        ModelOptions(model_name_or_path=inputs.model),
        DataOptions(eval_dataset=inputs.eval_dataset),
        TokenizationOptions(max_length=1024),
        ComparisonOptions(adapter=inputs.adapter or train(inputs), beta=inputs.beta),
        EvaluationOptions(num_completions=3, max_new_tokens=48),
    )
    print(f"\n{evaluation.describe()}")
    # Every metric is a field: perplexity tells whether the policy still speaks well.
    preference, policy, reference = evaluation.preference, evaluation.policy, evaluation.reference
    print(f"\n{preference.preference_accuracy:.1%} of the pairs have a margin above 0.")
    grown = policy.perplexity_chosen / reference.perplexity_chosen
    print(f"Perplexity of the chosen answers, policy over reference: {grown:.3f}.")
    return evaluation


if __name__ == "__main__":
    main()
