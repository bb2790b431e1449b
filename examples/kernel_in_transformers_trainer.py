"""fastdpo's cross entropy in a transformers Trainer: one method overridden.

    python examples/kernel_in_transformers_trainer.py    # a tiny random Llama, 7 s on two cores
    python examples/kernel_in_transformers_trainer.py --model Qwen/Qwen3-0.6B

Trains twice from the same weights, with Trainer and with KernelTrainer, and prints both losses.
Works under bf16 autocast and with a PEFT model too, as long as the adapters leave lm_head alone.
"""

import argparse
import copy
import tempfile

import torch
from fastdpo_kernels import linear_cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments


class KernelTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():  # bf16=True wraps model.forward alone
            # Changed: the backbone alone, its states with the head's rows in place of the logits.
            hidden_states = model.get_decoder()(**inputs).last_hidden_state[:, :-1]
            head = model.get_output_embeddings()
            total = linear_cross_entropy(
                hidden_states, head.weight, labels, linear_bias=head.bias, reduction="sum"
            )  # softcap= for Gemma 2, logit_scale= for Cohere and Granite
        loss = total / count
        return (loss, {"loss": loss}) if return_outputs else loss


def losses_of(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal LM of the hub, or its folder")
    parser.add_argument("--updates", type=int, default=5)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if options.model is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=1000, num_hidden_layers=2, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    rows = []
    for length in torch.randint(4, 24, (8 * options.updates,)).tolist():
        input_ids = torch.randint(model.config.vocab_size, (32,))
        labels = input_ids.clone()
        labels[:length] = -100  # a prompt, which is not learned: its positions cost nothing
        rows.append({"input_ids": input_ids, "labels": labels})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.updates,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        usual = losses_of(Trainer(copy.deepcopy(model), arguments, train_dataset=rows))
        kernel = losses_of(KernelTrainer(model, arguments, train_dataset=rows))
    for update, (one, other) in enumerate(zip(usual, kernel, strict=True), 1):
        print(f"update {update}  usual {one:.6f}  kernel {other:.6f}")
    return usual, kernel


if __name__ == "__main__":
    main()
