"""`python -m fastdpo.evaluate`: policy and reference side by side on held-out preference pairs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdpo import files
from fastdpo.command_line import command, parse
from fastdpo.options import DataOptions, EvaluationOptions, ModelOptions, resolve_model
from fastdpo.report import say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdpo.data import PairDataset
    from fastdpo.evaluation import Evaluation


USELESS = {"lora", "full", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
USELESS |= {"dataset_train_split"}
"""Options of training that come with the groups shared with it."""


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, print the table and write the JSON file."""
    parsed = parse(
        "evaluate",
        [ModelOptions, DataOptions, EvaluationOptions],
        argv,
        training=False,
        description="Evaluate a trained model on held-out preference pairs, beside its reference.",
    )
    if useless := sorted(USELESS & parsed.given):
        raise ValueError(
            f"--{useless[0]} changes nothing in an evaluation: leave it out. The adapter's folder "
            "says how it was made; --qlora loads the base in 4 bits as in training."
        )
    options = parsed.group(EvaluationOptions)
    evaluation = run(parsed.model, parsed.data, options)
    files.write_json(Path(options.output_file), evaluation.as_json())
    say(evaluation.describe())
    say(f"\nwritten to {options.output_file}")


def run(model: ModelOptions, data: DataOptions, options: EvaluationOptions) -> "Evaluation":
    """Load what the options name and evaluate it.

    Raises:
        ValueError: an option is missing, or the model or data cannot be had.
    """
    from fastdpo.batching import PairGroups, default_micro_batch_tokens
    from fastdpo.evaluation import Completion, complete, evaluate_scored, score_both
    from fastdpo.modeling.head import causal_lm_of
    from fastdpo.modeling.scoring import score_pairs

    policy, tokenizer = _load_policy(model, options)
    pairs = _read_pairs(data, options, tokenizer)
    groups = PairGroups(pairs)
    tokens = default_micro_batch_tokens(causal_lm_of(policy).device)
    prompts = [pair.prompt_ids for pair in pairs[: options.num_completions]]
    length = {"max_new_tokens": options.max_new_tokens}
    texts = complete(policy, tokenizer, prompts, **length)
    if options.reference is None:
        scored, ref_scored = score_both(policy, groups, micro_batch_tokens=tokens)
        ref_texts = complete(policy, tokenizer, prompts, reference=True, **length)
    else:
        scored = score_pairs(policy, groups, micro_batch_tokens=tokens, description="Policy")
        del policy
        reference = _load(model, resolve_model(options.reference)[0])
        ref_scored = score_pairs(
            reference, groups, micro_batch_tokens=tokens, description="Reference"
        )
        ref_texts = complete(reference, tokenizer, prompts, **length)
    completions = [
        Completion(str(tokenizer.decode(prompt, skip_special_tokens=True)), before, after)
        for prompt, before, after in zip(prompts, ref_texts, texts, strict=True)
    ]
    return evaluate_scored(scored, ref_scored, beta=options.beta, completions=completions)


def _load_policy(
    model: ModelOptions, options: EvaluationOptions
) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerBase"]:
    from fastdpo.modeling.adapters import load_adapter, peft_base_of
    from fastdpo.modeling.loading import load_tokenizer

    name = model.model_name_or_path
    if options.adapter is not None and options.reference is not None:
        raise ValueError(
            "--adapter and --reference exclude each other: with an adapter the reference is the "
            "model without it; --reference is for a --model whose weights were all trained."
        )
    if options.adapter is None and options.reference is None:
        raise ValueError(
            "there is nothing to compare: pass --adapter (the folder that training wrote), or, for "
            "a --model whose weights were all trained, --reference (the model it started from)."
        )
    if name is None:
        if options.adapter is None:
            raise ValueError("--model is missing: pass the folder of the trained model.")
        name = peft_base_of(options.adapter)
    name, sentence = resolve_model(name)
    if sentence:
        say(sentence)
    policy = _load(model, name)
    if options.adapter is not None:
        policy = load_adapter(policy, options.adapter)
    tokenizer = load_tokenizer(
        options.adapter or name,
        revision="main" if options.adapter else model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    return policy, tokenizer


def _load(model: ModelOptions, name: str) -> "PreTrainedModel":
    from fastdpo.modeling.adapters import fuse
    from fastdpo.modeling.loading import load_model, resolve_dtype

    loaded = load_model(
        name,
        dtype=resolve_dtype(model.dtype),
        load_in_4bit=model.qlora,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    fuse(loaded)
    return loaded


def _read_pairs(
    data: DataOptions, options: EvaluationOptions, tokenizer: "PreTrainedTokenizerBase"
) -> "PairDataset":
    from fastdpo.data import prepare_pairs, read_held_out

    source = data.eval_dataset or data.dataset_name
    if source is None:
        raise ValueError("--dataset is missing: pass held-out pairs, a .jsonl file for example.")
    rows = read_held_out(source, split=data.dataset_test_split, config_name=data.dataset_config)
    pairs = prepare_pairs(rows, tokenizer, max_length=options.max_length)
    say(pairs.report.describe())
    return pairs


if __name__ == "__main__":
    sys.exit(command(main))
