"""DPO from Python: a model, pairs, a LoRA adapter, and what it came to on held-out pairs.

    python examples/basic_dpo.py                         # the demo's tiny Llama, 9 s on two cores
    python examples/basic_dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized

The names are TRL's: put fastdpo where a script for TRL imports from trl, and it goes on working.
"""

from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_held_out, read_rows


def main(argv=None):
    inputs = parse(__doc__, argv)
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            inputs.output_dir,
            beta=0.1,
            learning_rate=inputs.learning_rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=16,  # pairs an update; it costs no memory
            max_steps=inputs.max_steps,
            save_strategy="no",
        ),
        train_dataset=read_rows(inputs.dataset),
        eval_dataset=read_held_out(inputs.eval_dataset),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before = trainer.evaluate()  # the adapter adds nothing yet: accuracy 0.5, margin 0
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    print(f"\n{'held-out pairs':24}{'before':>10}{'after':>10}")
    for name in ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"):
        print(f"{name:24}{before[f'eval_{name}']:10.4f}{after[f'eval_{name}']:10.4f}")
    print(f"\nThe adapter lies in {inputs.output_dir}; PEFT loads it as any other.")
    return before, after


if __name__ == "__main__":
    main()
