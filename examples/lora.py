"""LoRA: choose layers and rank, see what is trained, reload the adapter with plain PEFT.

    python examples/lora.py                              # the demo's tiny Llama, 8 s on two cores
    python examples/lora.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized

On the command line: python -m fastdpo.train --lora --lora_r 8 --lora_target_modules q_proj v_proj
"""

import torch
from example_inputs import parse
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_rows


def next_token_logits(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model(**inputs).logits[0, -1].float()


def main(argv=None):
    inputs = parse(__doc__, argv, lora_r=8, lora_target_modules=["q_proj", "v_proj"])
    rows = read_rows(inputs.dataset)
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            inputs.output_dir,
            learning_rate=inputs.learning_rate,
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
        ),
        train_dataset=rows,
        peft_config=LoraConfig(  # also use_rslora=True for high ranks, use_dora=True
            r=inputs.lora_r,
            lora_alpha=2 * inputs.lora_r,
            target_modules=inputs.lora_target_modules,
        ),
    )
    trainer.policy.print_trainable_parameters()
    trainer.train()
    trainer.save_model()

    # Whoever gets the adapter needs transformers and PEFT, and not fastdpo.
    base = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=trainer.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(inputs.output_dir)
    reloaded = PeftModel.from_pretrained(base, inputs.output_dir).to(trainer.model.device)
    text = "Troll: Hot soup?\nHost:"
    wanted = next_token_logits(reloaded.eval(), tokenizer, text)
    with reloaded.disable_adapter():
        moved = (wanted - next_token_logits(reloaded, tokenizer, text)).abs().max().item()
    trainer.policy.eval()
    merged = trainer.policy.merge_and_unload()  # in memory; fastdpo.merge does it shard by shard
    apart = (wanted - next_token_logits(merged, tokenizer, text)).abs().max().item()
    print(f"\nThe adapter moves the logits after {text!r} by up to {moved:.3f}.")
    print(f"Reloaded by PEFT, against merged here: {apart:.1e} apart.")
    return moved, apart


if __name__ == "__main__":
    main()
