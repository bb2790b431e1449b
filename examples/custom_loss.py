"""A loss of your own: a function of the pairs' log-probs. Here DPO-Positive, against plain DPO.

    python examples/custom_loss.py                       # the demo's tiny Llama, 11 s on two cores
    python examples/custom_loss.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized

DPO is content when both log-probs fall, the rejected one faster. DPO-Positive (arXiv:2402.13228)
adds what the chosen one has lost against the reference; its reward then stays up.
"""

import torch
import torch.nn.functional as F
from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_held_out, read_rows
from fastdpo.losses import PairLogps

BETA = 0.1
PENALTY = 5.0


def dpo_positive(pairs: PairLogps) -> torch.Tensor:
    """One loss a pair, shape (B,); the trainer takes their mean over the update."""
    lost = (-pairs.chosen_logratios).relu()
    return -F.logsigmoid(BETA * (pairs.margins - PENALTY * lost))


def train(inputs, loss_function):
    """Rewards on held-out pairs after training; None is DPO itself."""
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            f"{inputs.output_dir}/{getattr(loss_function, '__name__', 'dpo')}",
            beta=BETA,
            learning_rate=4 * inputs.learning_rate,  # too much, so that the difference shows
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
        ),
        train_dataset=read_rows(inputs.dataset),
        eval_dataset=read_held_out(inputs.eval_dataset),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        loss_function=loss_function,
    )
    trainer.train()
    return trainer.evaluate()


def main(argv=None):
    inputs = parse(__doc__, argv)
    results = {"DPO": train(inputs, None), "DPO-Positive": train(inputs, dpo_positive)}
    print(f"\n{'held-out pairs':16}{'accuracy':>10}{'chosen':>10}{'rejected':>10}")
    for name, metrics in results.items():
        values = (metrics[f"eval_rewards/{key}"] for key in ("accuracies", "chosen", "rejected"))
        print(f"{name:16}" + "".join(f"{value:10.3f}" for value in values))
    return results


if __name__ == "__main__":
    main()
