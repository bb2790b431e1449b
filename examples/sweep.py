"""A sweep over beta and learning rate in which the reference is computed once.

    python examples/sweep.py                             # the demo's tiny Llama, 17 s on two cores
    python examples/sweep.py --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl --betas 0.05 0.1

Stored reference log-probs are looked up by the tokens of a pair and the weights of the reference.
Beta, learning rate, seed, rank and output folder are no part of that, so every run after the first
one finds all of them; the table counts what each run had to compute.
"""

import itertools
import time
from pathlib import Path

from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_held_out, read_rows
from fastdpo.ref_cache.maintenance import store_folders, summarize


def stored_completions(store):
    return sum(summarize(folder).rows for folder in store_folders(store) if folder.is_dir())


def run(inputs, store, beta, learning_rate):
    trainer = DPOTrainer(
        inputs.model,
        args=DPOConfig(
            f"{inputs.output_dir}/beta-{beta}-lr-{learning_rate}",
            beta=beta,
            learning_rate=learning_rate,
            ref_cache=str(store),
            per_device_train_batch_size=16,
            max_steps=inputs.max_steps,
            save_strategy="no",
        ),
        train_dataset=read_rows(inputs.dataset),
        eval_dataset=read_held_out(inputs.eval_dataset),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before, start = stored_completions(store), time.monotonic()
    trainer.compute_references()
    seconds, computed = time.monotonic() - start, stored_completions(store) - before
    trainer.train()
    return computed, seconds, trainer.evaluate()


def main(argv=None):
    inputs = parse(__doc__, argv, betas=[0.05, 0.2], learning_rates=[0.0])
    given = inputs.learning_rate
    rates = [rate for rate in inputs.learning_rates if rate] or [given / 3, given]
    store = Path(inputs.output_dir) / "reference"
    results = {
        (beta, rate): run(inputs, store, beta, rate)
        for beta, rate in itertools.product(inputs.betas, rates)
    }
    print(f"\n{'beta':>6}{'lr':>10}{'computed':>10}{'s':>7}{'accuracy':>10}{'chosen logp':>13}")
    for (beta, rate), (computed, seconds, metrics) in results.items():
        accuracy, logps = metrics["eval_rewards/accuracies"], metrics["eval_logps/chosen"]
        print(f"{beta:6g}{rate:10.1e}{computed:10}{seconds:7.2f}{accuracy:10.3f}{logps:13.2f}")
    return results


if __name__ == "__main__":
    main()
