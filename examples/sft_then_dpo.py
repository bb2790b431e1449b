"""SFT, then DPO from the SFT adapter: the reference is a frozen copy of it, on one base model.

    python examples/sft_then_dpo.py                      # the demo's tiny Llama, 12 s on two cores
    python examples/sft_then_dpo.py --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl

Nothing is merged and no second model is loaded. The first margin is 0, as it must be when training
begins at the reference; `reference="base"` compares with the model without any adapter instead.
"""

from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_held_out, read_rows


def train(model, inputs, folder, peft_config, **options):
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            folder,
            learning_rate=inputs.learning_rate,
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
            **options,
        ),
        train_dataset=read_rows(inputs.dataset),
        eval_dataset=read_held_out(inputs.eval_dataset),
        peft_config=peft_config,
    )
    print(f"\n{trainer.reference.reference.description}")
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return trainer, before, trainer.evaluate()


def main(argv=None):
    inputs = parse(__doc__, argv)
    sft_folder = f"{inputs.output_dir}/sft"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    # The chosen answers as plain fine-tuning data; the rejected ones are only logged.
    sft, *sft_metrics = train(inputs.model, inputs, sft_folder, lora, loss_type="sft")
    # A folder with an adapter in it: the adapter is trained on, a frozen copy is the reference.
    dpo, *dpo_metrics = train(sft_folder, inputs, f"{inputs.output_dir}/dpo", None)
    print(f"\nLargest margin of the first DPO update: {dpo.first_update_margin} nats.")
    print(f"{'held-out pairs':16}{'chosen logp':>14}{'rejected logp':>16}{'accuracy':>12}")
    for name, metrics in (
        ("base", sft_metrics[0]),
        ("after SFT", sft_metrics[1]),
        ("SFT, then DPO", dpo_metrics[1]),
    ):
        chosen, rejected = (metrics[f"eval_logps/{side}"] for side in ("chosen", "rejected"))
        accuracy = metrics["eval_rewards/accuracies"]
        print(f"{name:16}{chosen:14.2f}{rejected:16.2f}{accuracy:12.3f}")
    return sft, dpo, sft_metrics, dpo_metrics


if __name__ == "__main__":
    main()
