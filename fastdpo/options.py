"""Our own options: dataclasses with their checks, the presets of the command, model aliases.

Only the standard library is imported, so that `--help` is quick and any other room may read this.
Every field's help says what it is, in which unit, and why its default is what it is; help texts
go through argparse, so they hold no percent sign.
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DEFAULT_DATASET = "trl-lib/ultrafeedback_binarized"

MODEL_ALIASES = {
    "llama-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-9b": "google/gemma-2-9b-it",
}

LOSS_TYPES = ("sigmoid",)
DTYPES = ("auto", "bfloat16", "float16", "float32")
TRUNCATION_MODES = ("keep_completion", "keep_start")
SPECIAL_TOKEN_MODES = ("literal", "allow", "error")
SHARED_PREFIX_MODES = ("auto", "off")
REF_TOKEN_LOGPS_MODES = ("on", "off")
REF_VERSIONS_MODES = ("warn", "strict")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text, and `choices` or `aliases` for the command line."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelOptions:
    """Which model is trained, in which precision, and which of its weights move."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = _option(
        None,
        f"Folder, hub id or alias of the model to train; aliases: {', '.join(MODEL_ALIASES)}.",
        aliases=["--model"],
    )
    model_revision: str = _option("main", "Branch, tag or commit on the hub; a commit never moves.")
    dtype: str = _option(
        "auto",
        "Precision of the frozen weights; auto is bfloat16 on a CUDA card that supports it, "
        "else float32.",
        choices=list(DTYPES),
    )
    trust_remote_code: bool = _option(
        False, "Run Python code that the model's repository ships; off, since it can do anything."
    )
    qlora: bool = _option(False, "Train a LoRA adapter over 4-bit (NF4) weights: the least memory.")
    lora: bool = _option(False, "Train a LoRA adapter over whole weights: faster, more memory.")
    full: bool = _option(False, "Train every weight: about 16 bytes of memory per parameter.")
    lora_r: int = _option(16, "Rank of the adapter; 16 is enough for most preference data.")
    lora_alpha: int = _option(32, "Adapter scale, applied as alpha / r; twice the rank is usual.")
    lora_dropout: float = _option(
        0.0, "Dropout before the adapter, 0 to below 1; 0, since noise hides small preferences."
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get an adapter; unset: every linear layer but the head."},
    )

    def __post_init__(self) -> None:
        chosen = [f"--{name}" for name in ("qlora", "lora", "full") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} exclude each other: keep one. --qlora needs the least "
                "memory, --lora is faster where 16-bit weights fit, --full trains every weight."
            )
        _check_choice("dtype", self.dtype, DTYPES)
        _check_whole("lora_r", self.lora_r, 1, "16 is usual")
        _check_number("lora_alpha", self.lora_alpha, above=0, remedy="Twice --lora_r is usual.")
        _check_number("lora_dropout", self.lora_dropout, at_least=0, below=1, remedy="0 is usual.")
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = None
        if self.lora_target_modules == []:
            raise ValueError(
                "--lora_target_modules is empty; name at least one layer (q_proj v_proj), or leave "
                "it out for every linear layer but the head."
            )


@dataclass
class DataOptions:
    """Which preference pairs are read."""

    _argument_group_name = "Data"

    dataset_name: str | None = _option(
        None,
        "JSONL or Parquet file, folder, or hub id of the preference pairs.",
        aliases=["--dataset"],
    )
    dataset_config: str | None = _option(None, "Configuration of the hub dataset, if any.")
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_split: str = _option("test", "Split to evaluate on, where the dataset has it.")
    eval_dataset: str | None = _option(
        None, "File, folder or hub id to evaluate on instead of the test split."
    )


@dataclass
class PreferenceOptions:
    """The options of DPO itself; `DPOConfig` inherits them."""

    _argument_group_name = "Preference optimisation and its reference"

    beta: float = _option(
        0.1,
        "Reward per nat of log-ratio; higher holds the policy nearer to the reference. 0.1 as in "
        "TRL and most recipes.",
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"Loss of a pair; built today: {', '.join(LOSS_TYPES)}."},
    )
    max_length: int | None = _option(
        1024, "Most tokens of prompt + completion; longer ones are truncated. none: no limit."
    )
    truncation_mode: str = _option(
        "keep_completion",
        "What an over-long pair keeps: keep_completion cuts the prompt from the left, keep_start "
        "keeps the first tokens of prompt + completion as TRL does, which eats the completion.",
        choices=list(TRUNCATION_MODES),
    )
    special_tokens_in_content: str | None = _option(
        None,
        "Control tokens written inside the data: literal encodes them as plain text, allow as "
        "tokens, error refuses the row. Unset: literal in conversations, allow in ready strings.",
        choices=list(SPECIAL_TOKEN_MODES),
    )
    strict_data: bool = _option(
        False,
        "Stop at a useless row (empty, identical, over-long) instead of dropping it.",
    )
    disable_dropout: bool = _option(
        True,
        "Turn the model's own dropout off, which would blur policy against reference.",
    )
    micro_batch_tokens: int | None = _option(
        None,
        "Most tokens of a packed micro-batch, at least 128; bounds the memory, never changes the "
        "update. Unset: chosen for the device.",
    )
    shared_prefix: str = _option(
        "auto",
        "auto computes the prompt of a pair once for both completions where that is exact; off "
        "computes it once per completion.",
        choices=list(SHARED_PREFIX_MODES),
    )
    ref_cache: str | None = _option(
        None,
        "Folder of the stored reference log-probs, or off to compute the reference in each update. "
        "Unset: $FASTDPO_CACHE, $XDG_CACHE_HOME/fastdpo or ~/.cache/fastdpo, in reference/.",
    )
    ref_token_logps: str = _option(
        "on",
        "on stores the reference log-prob of every token beside their sum, 4 bytes each, which "
        "losses that weigh tokens will need; off stores the sums alone.",
        choices=list(REF_TOKEN_LOGPS_MODES),
    )
    ref_versions: str = _option(
        "warn",
        "Stored reference log-probs that other library versions or another card computed: warn "
        "uses them, as they differ in rounding alone, and says so; strict computes them again.",
        choices=list(REF_VERSIONS_MODES),
    )
    ref_spot_check: int = _option(
        4,
        "Stored pairs to score again before they are believed; a run stops where they differ by "
        "more than rounding. A few show a wrong store at the cost of a second; 0 does not look.",
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "More arguments for from_pretrained, as a dict or JSON."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if not self.loss_type or not all(name in LOSS_TYPES for name in self.loss_type):
            raise ValueError(
                f"--loss_type is {' '.join(map(str, self.loss_type)) or 'empty'}; built today: "
                f"{', '.join(LOSS_TYPES)}. Leave it out to use sigmoid."
            )
        if len(self.loss_type) > 1:
            raise ValueError("--loss_type names several losses; a sum is not built, name one.")
        _check_number(
            "beta", self.beta, above=0, remedy="0.1 is usual; less lets the policy move further."
        )
        if self.max_length is not None:
            _check_whole("max_length", self.max_length, 8, "1024 is usual, none lifts the limit")
        if self.micro_batch_tokens is not None:
            _check_whole(
                "micro_batch_tokens", self.micro_batch_tokens, 128, "leave it out to choose"
            )
        _check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        _check_choice("shared_prefix", self.shared_prefix, SHARED_PREFIX_MODES)
        if self.special_tokens_in_content is not None:
            _check_choice(
                "special_tokens_in_content", self.special_tokens_in_content, SPECIAL_TOKEN_MODES
            )
        if self.ref_cache is not None:
            self.ref_cache = os.fspath(self.ref_cache)
            if not self.ref_cache.strip():
                raise ValueError("--ref_cache is empty; give a folder, off, or leave it out.")
        _check_choice("ref_token_logps", self.ref_token_logps, REF_TOKEN_LOGPS_MODES)
        _check_choice("ref_versions", self.ref_versions, REF_VERSIONS_MODES)
        _check_whole("ref_spot_check", self.ref_spot_check, 0, "4 is usual, 0 does not look")
        self.model_init_kwargs = _as_dict("model_init_kwargs", self.model_init_kwargs)

    @property
    def from_pretrained_options(self) -> dict[str, Any]:
        """`model_init_kwargs` as the dict that it is from `__post_init__` on."""
        assert not isinstance(self.model_init_kwargs, str), "__post_init__ has read the JSON"
        return dict(self.model_init_kwargs or {})


@dataclass
class RunOptions:
    """The inherited training options that runs set most, with the defaults of the command.

    `python -m fastdpo.train` shows them and lays them below what the user gave; `DPOConfig` used
    from Python never sees them and keeps TRL's defaults. Types are those of TrainingArguments.
    """

    _argument_group_name = "Training (the most used; --help_all has the rest)"

    output_dir: str = _option("fastdpo-output", "Folder of checkpoints, the result and its log.")
    learning_rate: float = _option(1e-5, "Peak learning rate; 1e-6 where --full is given.")
    lr_scheduler_type: str = _option("cosine", "Course of the learning rate after the warm-up.")
    warmup_steps: float = _option(0.1, "Warm-up: below 1 a share of the run, from 1 on updates.")
    num_train_epochs: float = _option(1.0, "Passes over the pairs; DPO overfits quickly.")
    max_steps: int = _option(-1, "Updates, in place of epochs, if positive.")
    per_device_train_batch_size: int = _option(
        32,
        "Pairs per update, times --gradient_accumulation_steps. Micro-batches are laid out by "
        "tokens, so this costs no memory. 8 where only the other one is given.",
    )
    gradient_accumulation_steps: int = _option(1, "Multiplies the pairs per update, as in TRL.")
    max_grad_norm: float = _option(1.0, "Clip the gradient to this norm; 0 is no clipping.")
    optim: str = _option("adamw_torch_fused", "Optimizer, for example paged_adamw_8bit.")
    logging_steps: float = _option(10, "Updates between two log lines.")
    eval_strategy: str = _option(
        "epoch", "When to evaluate: no, steps, epoch; steps where --eval_steps is given."
    )
    eval_steps: float | None = _option(None, "Updates, or a share of the run, between evaluations.")
    save_strategy: str = _option("steps", "When to write a checkpoint: no, steps, epoch, best.")
    save_steps: float = _option(500, "Updates, or a share of the run, between checkpoints.")
    save_total_limit: int | None = _option(None, "Most checkpoints kept; unset keeps all.")
    resume_from_checkpoint: str | None = _option(None, "Checkpoint folder to go on from.")
    seed: int = _option(42, "Seed of the adapter's start and of the order of the pairs.")
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Trackers: none, trackio, tensorboard, wandb, all."}
    )


@dataclass
class EvaluationOptions:
    """What is compared, and what is shown of it."""

    _argument_group_name = "Evaluation"

    adapter: str | None = _option(
        None, "Folder of the trained adapter; the reference is the model without it."
    )
    reference: str | None = _option(
        None, "The model that a fully trained --model started from, to compare with."
    )
    beta: float = _option(0.1, "Reward per nat of log-ratio, as in training.")
    max_length: int | None = _option(1024, "Most tokens of prompt + completion, as in training.")
    num_completions: int = _option(3, "Prompts that both models complete, for you to read.")
    max_new_tokens: int = _option(64, "Most tokens of such a completion.")
    output_file: str = _option("evaluation.json", "JSON file that the figures are written to.")

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0, remedy="Pass the beta of the training run.")
        if self.max_length is not None:
            _check_whole("max_length", self.max_length, 8, "1024 is usual, none lifts the limit")
        _check_whole("num_completions", self.num_completions, 0, "0 writes none")
        _check_whole("max_new_tokens", self.max_new_tokens, 1, "64 is usual")


def presets(given: Mapping[str, Any]) -> dict[str, Any]:
    """The command's defaults for the inherited training options, to be laid below `given`.

    Where one given option decides what another one means, the other's preset gives way: naming
    one of the two batch numbers leaves TRL's default for the other (8 and 1), `eval_steps` asks
    for evaluation by steps, and `full` trains at TRL's 1e-6.

    Args:
        given: what the user set, by name.

    Returns:
        Values by name; `{**presets(given), **given}` is what the run uses.
    """
    values = {entry.name: entry.default for entry in fields(RunOptions)}
    if "gradient_accumulation_steps" in given:
        values["per_device_train_batch_size"] = 8
    if "eval_steps" in given:
        values["eval_strategy"] = "steps"
    if given.get("full"):
        values["learning_rate"] = 1e-6
    return values


def resolve_model(name: str) -> tuple[str, str | None]:
    """What a model name stands for.

    Args:
        name: a folder, a hub id or one of `MODEL_ALIASES`.

    Returns:
        The folder or hub id to load, and one sentence to show where the name was an alias. A
        folder of that name wins over the alias.
    """
    repository = MODEL_ALIASES.get(name.lower())
    if repository is None or Path(name).is_dir():
        return name, None
    return repository, f"{name} means {repository} on the Hugging Face hub."


def reference_folder(ref_cache: str | None) -> Path | None:
    """The folder of the reference store that `--ref_cache` asks for; None means off."""
    if ref_cache == "off":
        return None
    if ref_cache is not None:
        return Path(ref_cache).expanduser()
    if own := os.environ.get("FASTDPO_CACHE"):
        return Path(own).expanduser() / "reference"
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user).expanduser() / "fastdpo" / "reference"


def _check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}.")


def _check_whole(name: str, value: Any, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"--{name} is {value!r}; it must be a whole number, {least} or more: {remedy}."
        )


def _check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    remedy: str,
) -> None:
    """Refuse what is not a finite number within the bounds (`above` and `below` are excluded)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and value > above and value >= at_least and value < below:
        return
    needed = [f"above {above}" if above > -math.inf else f"of at least {at_least}"]
    needed += [f"below {below}"] if below < math.inf else []
    raise ValueError(
        f"--{name} is {value!r}; it must be a finite number {' and '.join(needed)}. {remedy}"
    )


def _as_dict(name: str, value: Any) -> dict[str, Any] | None:
    """A dict given as such or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--{name} is {value!r}, which is not JSON ({error}); write it as "
                """'{"key": "value"}'."""
            ) from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"--{name} is {value!r}; it must be a dict, or JSON text of one.")
    return value
