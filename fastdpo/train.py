"""`python -m fastdpo.train`: align a model with preference pairs; without arguments, a demo."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.command_line import command, parse
from fastdpo.options import DEFAULT_DATASET, DataOptions, ModelOptions, resolve_model
from fastdpo.report import say

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.data import Rows
    from fastdpo.evaluation import Evaluation
    from fastdpo.trainer import DPOTrainer


def main(argv: Sequence[str]) -> None:
    """Parse and train; the demo if there is nothing to parse."""
    if not argv:
        demonstrate(Path("fastdpo-demo"))
        return
    parsed = parse(
        "train",
        [ModelOptions, DataOptions],
        argv,
        training=True,
        description="Align a model with preference pairs by Direct Preference Optimization.",
    )
    run(parsed.model, parsed.data, parsed.training)


def run(model: ModelOptions, data: DataOptions, config: "DPOConfig") -> "DPOTrainer":
    """Train what the options name, save it, and say where it lies.

    Raises:
        ValueError: an option is missing, or the model or data cannot be had.
    """
    trainer = make_trainer(model, data, config)
    trainer.train(resume_from_checkpoint=_resume(config.resume_from_checkpoint))
    trainer.save_model()
    _say_result(trainer, model, data)
    return trainer


def make_trainer(model: ModelOptions, data: DataOptions, config: "DPOConfig") -> "DPOTrainer":
    """Load what the options name and put the trainer together.

    Raises:
        ValueError: an option is missing, or the model or data cannot be had.
    """
    from fastdpo.modeling.adapters import lora_config
    from fastdpo.modeling.loading import load_tokenizer, resolve_dtype
    from fastdpo.reference import load_identified
    from fastdpo.trainer import DPOTrainer

    name = _model_name(model)
    source: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": model.trust_remote_code,
    }
    tokenizer = load_tokenizer(name, **source)
    train_rows, eval_rows = _read(data)
    if not (model.full or model.qlora or model.lora):
        say(
            "Training a LoRA adapter (--lora); --qlora needs less memory, --full trains everything."
        )
    dtype = resolve_dtype("float32" if model.full and model.dtype == "auto" else model.dtype)
    policy = load_identified(
        name,
        dtype=dtype,
        load_in_4bit=model.qlora,
        options=config.from_pretrained_options,
        **source,
    )
    config.model_init_kwargs = None
    if eval_rows is None:
        config.eval_strategy = "no"
    return DPOTrainer(
        policy,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=None
        if model.full
        else lora_config(
            model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules
        ),
    )


def demonstrate(folder: Path) -> "Evaluation":
    """The embedded default: make a tiny model and pairs in `folder`, align it, show the change."""
    from fastdpo.batching import PairGroups
    from fastdpo.config import DPOConfig
    from fastdpo.demo import make_demo
    from fastdpo.evaluation import Completion, complete, evaluate_scored, score_both
    from fastdpo.modeling.loading import load_tokenizer

    say("No arguments: the demo. It makes a tiny Llama, teaches it a small language, lets it write")
    say("answers, and aligns it with preferences between them. --help shows the options.\n")
    demo = make_demo(folder, report=say)
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
        trainer.policy, trainer.eval_groups, micro_batch_tokens=trainer.micro_batch_tokens
    )
    completion = Completion(
        demo.prompt,
        *complete(trainer.policy, tokenizer, [prompt], max_new_tokens=64, reference=True),
        *complete(trainer.policy, tokenizer, [prompt], max_new_tokens=64),
    )
    evaluation = evaluate_scored(policy, reference, beta=config.beta, completions=[completion])
    say(f"\n{evaluation.describe()}")
    say(
        "\nBefore training policy and reference are one: largest margin of the first update "
        f"{trainer.first_update_margin} nats."
    )
    return evaluation


def _model_name(model: ModelOptions) -> str:
    if model.model_name_or_path is None:
        raise ValueError(
            "--model is missing: pass a folder, a hub id or an alias such as llama-7b. Without any "
            "argument the command runs its demo."
        )
    name, sentence = resolve_model(model.model_name_or_path)
    if sentence:
        say(sentence)
    return name


def _read(data: DataOptions) -> tuple["Rows", "Rows | None"]:
    """Training rows, and the rows to evaluate on if there are any."""
    from fastdpo.data import UnknownSplitError, read_held_out, read_rows

    name = data.dataset_name
    if name is None:
        name = DEFAULT_DATASET
        say(f"No --dataset was named: using {name} from the Hugging Face hub.")
    options = {"config_name": data.dataset_config}
    train_rows = read_rows(name, split=data.dataset_train_split, **options)
    if data.eval_dataset is not None:
        return train_rows, read_held_out(data.eval_dataset, split=data.dataset_test_split)
    if Path(name).is_file():
        return train_rows, None
    try:
        return train_rows, read_rows(name, split=data.dataset_test_split, **options)
    except UnknownSplitError as error:
        say(f"Not evaluating: {error}")
        return train_rows, None


def _resume(value: str | None) -> str | bool | None:
    """`true` and `auto` ask for the newest checkpoint, anything else is a folder."""
    return True if value is not None and value.lower() in ("true", "auto") else value


def _say_result(trainer: "DPOTrainer", model: ModelOptions, data: DataOptions) -> None:
    folder = trainer.args.output_dir
    kind = "adapter" if trainer.trains_adapter else "model"
    say(f"\nThe {kind} lies in {folder}.")
    figures: dict[str, Any] = next(
        (line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {}
    )
    if figures:
        say(
            f"Held-out pairs: preference accuracy {figures['eval_rewards/accuracies']:.3f}, "
            f"loss {figures['eval_loss']:.4f}, margin {figures['eval_rewards/margins']:.3f}."
        )
    start = model.model_name_or_path
    policy = f"--model {start} --adapter {folder}"
    if not trainer.trains_adapter:
        policy = f"--model {folder} --reference {start}"
    pairs = data.eval_dataset or data.dataset_name or DEFAULT_DATASET
    say(f"Compare with the reference: python -m fastdpo.evaluate {policy} --dataset {pairs}")


if __name__ == "__main__":
    sys.exit(command(main))
