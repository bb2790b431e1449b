"""Makes a trainer from the options of a command, runs it, and prints where its result lies."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.options import DEFAULT_DATASET, DataOptions, ModelOptions, resolve_model
from fastdpo.options.passes import check_base_weights
from fastdpo.system import files, ranks, signals
from fastdpo.system.console import print_line
from fastdpo.system.start_up import start_up

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.data import Rows
    from fastdpo.trainer import DPOTrainer


def run(model: ModelOptions, data: DataOptions, config: "DPOConfig") -> "DPOTrainer":
    """Train the model that the options name, save it, and print where it was saved.

    Raises:
        ValueError: an option is missing, the model or data cannot be loaded, or another process
            is training into the output folder.
        SystemExit, KeyboardInterrupt: after a signal, with a checkpoint or the result.
    """
    from fastdpo.trainer.checkpoint import claimed

    folder = claimed(Path(str(config.output_dir)))
    with ranks.held_by_first(folder):  # from before the loading until all is saved
        trainer = make_trainer(model, data, config)
        trainer.dataset_name = data.dataset_name
        with signals.deferred():
            trainer.train(resume_from_checkpoint=resume_of(config.resume_from_checkpoint))
            trainer.save_model()
            _print_result(trainer, model, data)
    return trainer


def make_trainer(model: ModelOptions, data: DataOptions, config: "DPOConfig") -> "DPOTrainer":
    """Load the model and data that the options name, and make a trainer of them.

    Raises:
        ValueError: an option is missing, or the model or data cannot be loaded.
    """
    from fastdpo.modeling.adapters import is_adapter, lora_config
    from fastdpo.modeling.loading import load_tokenizer, resolve_dtype
    from fastdpo.trainer import DPOTrainer
    from fastdpo.trainer.prepare import load_policy
    from fastdpo.trainer.requirements import require_all

    name = _model_name(model)
    require_all(config)
    check_base_weights(config.base_weights, trains_adapter=not model.full)
    source: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": model.trust_remote_code,
    }
    start_up.imported()
    with start_up.part("data"):
        tokenizer = load_tokenizer(name, **source)
        train_rows, eval_rows = _read(data)
    continues_adapter = is_adapter(name)
    if continues_adapter:
        print_line(f"Training the adapter in {name} on.")
    elif not (model.full or model.qlora or model.lora):
        print_line(
            "Training a LoRA adapter (--lora); --qlora needs less memory, --full trains everything."
        )
    dtype = resolve_dtype("float32" if model.full and model.dtype == "auto" else model.dtype)
    with start_up.part("model"):
        policy = load_policy(
            name,
            dtype=dtype,
            load_in_4bit=model.qlora,
            base_weights="gpu" if model.full else config.base_weights,
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
        if model.full or continues_adapter
        else lora_config(
            model.lora_r,
            model.lora_alpha,
            model.lora_dropout,
            model.lora_target_modules,
            use_rslora=model.use_rslora,
            use_dora=model.use_dora,
        ),
    )


@contextmanager
def without_output(config: "DPOConfig") -> Iterator["DPOConfig"]:
    """Options for a trainer that writes no result: transformers.Trainer makes a folder at once."""
    with files.scratch_folder() as folder:
        scratch = copy.copy(config)
        scratch.output_dir = str(folder)
        yield scratch


def _model_name(model: ModelOptions) -> str:
    """The folder or hub id of `--model`, its aliases resolved and explained."""
    if model.model_name_or_path is None:
        raise ValueError(
            "--model is missing: pass a folder, a hub id or an alias such as llama-7b. Without any "
            "argument the command runs its demo."
        )
    name, sentence = resolve_model(model.model_name_or_path)
    if sentence:
        print_line(sentence)
    return name


def _read(data: DataOptions) -> tuple["Rows", "Rows | None"]:
    """Read the training rows, and the rows to evaluate on if there are any."""
    from fastdpo.data import UnknownSplitError, read_held_out, read_mixture, read_rows

    if data.mixture is not None:
        shared = {name: value for name, value in data.reading.items() if name != "columns"}
        train_rows, held_out = read_mixture(data.mixture, **shared)
        if data.eval_dataset is not None:
            split = data.dataset_test_split
            held_out = read_held_out(data.eval_dataset, split=split, **shared)
        return train_rows, held_out
    name = data.dataset_name
    if name is None:
        name = DEFAULT_DATASET
        print_line(f"No --dataset was named: using {name} from the Hugging Face hub.")
    options = {"config_name": data.dataset_config, "streaming": data.dataset_streaming}
    train_rows = read_rows(name, split=data.dataset_train_split, **options, **data.reading)
    if data.eval_dataset is not None:
        split = data.dataset_test_split
        return train_rows, read_held_out(data.eval_dataset, split=split, **data.reading)
    if Path(name).is_file() and "[" not in data.dataset_test_split:
        return train_rows, None
    try:
        test_split = data.dataset_test_split
        return train_rows, read_rows(name, split=test_split, **options, **data.reading)
    except UnknownSplitError as error:
        print_line(f"Not evaluating: {error}")
        return train_rows, None


def resume_of(value: str | None) -> str | bool | None:
    """True for `true` and `auto`, which mean the newest checkpoint; anything else is a folder."""
    return True if value is not None and value.lower() in ("true", "auto") else value


def _print_result(trainer: "DPOTrainer", model: ModelOptions, data: DataOptions) -> None:
    """Print where the result lies, its last evaluation, and the commands that take it further."""
    folder = trainer.args.output_dir
    kind = "adapter" if trainer.trains_adapter else "model"
    print_line(f"\nThe {kind} lies in {folder}.")
    metrics: dict[str, Any] = next(
        (line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {}
    )
    if metrics:
        print_line(
            f"Held-out pairs: preference accuracy {metrics['eval_rewards/accuracies']:.3f}, "
            f"loss {metrics['eval_loss']:.4f}, reward margin {metrics['eval_rewards/margins']:.3f}."
        )
    start = model.model_name_or_path
    first = data.mixture.datasets[0].path if data.mixture is not None else DEFAULT_DATASET
    pairs = data.eval_dataset or data.dataset_name or first
    if not trainer.trains_adapter:
        policy = f"--model {folder} --reference {start}"
        print_line(
            f"Compare with the reference: python -m fastdpo.evaluate {policy} --dataset {pairs}"
        )
        return
    four_bit = " --qlora" if model.qlora else ""
    policy = f"--adapter {folder}{four_bit}"
    reference = trainer.reference.reference
    if reference.adapter is None and reference.model is trainer.policy:  # it is the base
        print_line(
            f"Compare with the reference: python -m fastdpo.evaluate {policy} --dataset {pairs}"
        )
    print_line(f"Make one plain model of it: python -m fastdpo.merge {policy} --output_dir merged")
