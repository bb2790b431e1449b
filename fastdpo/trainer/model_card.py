"""The model card: which model was trained, on which data, with which options and result."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fastdpo.config import DPOConfig
from fastdpo.options import PreferenceOptions
from fastdpo.system.console import printable
from fastdpo.version import __version__

TAGS = ("fastdpo", "dpo", "preference-optimization")
_LIBRARIES = ("torch", "transformers", "peft", "datasets", "bitsandbytes")
_SECRETS = ("--hub_token", "--hub-token")
_RUN = (
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
"""Options that are always listed."""

_PATHS = ("ref_cache", "reference", "model_init_kwargs")
"""Options that hold local paths; the card may be read by anyone."""

_CITATION = """\
@inproceedings{rafailov2023direct,
    title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning
                 and Stefano Ermon and Chelsea Finn},
    booktitle = {Advances in Neural Information Processing Systems 36},
    year      = {2023},
    url       = {https://arxiv.org/abs/2305.18290}
}"""


@dataclass(frozen=True)
class TrainedModel:
    """The facts that a model card is made of.

    Attributes:
        name: name of the trained model.
        base_model: folder or hub id that training started from; empty if it has none.
        is_adapter: whether an adapter was trained, or all weights.
        reference: the sentence that names the reference of the run.
        args: the options, as the user gave them.
        pairs: number of training pairs.
        updates: number of updates that were done.
        dataset: folder, file or hub id of the pairs, if known.
        evaluation: metrics of the last evaluation by their logged names; empty without one.
        command: the arguments that started the run, if it was a command.
        tags: more tags for the hub.
        versions: versions of the libraries, by their names.
        curves: name of the image of the run's curves beside the card, if there is one.
    """

    name: str
    base_model: str
    is_adapter: bool
    reference: str
    args: DPOConfig
    pairs: int
    updates: int
    dataset: str | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    command: Sequence[str] = ()
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: str | None = None


def library_versions() -> dict[str, str]:
    """The versions of Python, fastdpo and the libraries that a result depends on, by name."""
    return {"fastdpo": __version__, "python": platform.python_version()} | {
        name: version(name) for name in _LIBRARIES
    }


def model_card(model: TrainedModel) -> str:
    """The README.md of a trained model: YAML front matter for the hub, then Markdown.

    Local folders appear by their last name alone, and never as a base_model or dataset of the hub;
    tokens in the command are left out.
    """
    parts = [
        f"---\n{_front_matter(model).to_yaml()}\n---",
        f"# {_plain(model.name).replace('<', '&lt;')}",
        _introduction(model),
        "## Training\n\n" + _table(("Option", "Value"), _options(model.args).items()),
    ]
    if model.evaluation:
        parts.append(
            f"## Evaluation\n\nHeld-out pairs, after {model.updates} updates:\n\n"
            + _table(("Metric", "Value"), _metrics(model.evaluation))
        )
    if model.curves:
        parts.append(f"## Curves\n\n![Loss, margin, accuracy and log-ratios]({model.curves})")
    if model.command:
        words = [_plain(word) for word in _without_secrets(model.command)]
        parts.append(f"## Command\n\n```\n{shlex.join(words)}\n```")
    if model.versions:
        parts.append("## Versions\n\n" + _table(("Library", "Version"), model.versions.items()))
    parts.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _front_matter(model: TrainedModel) -> ModelCardData:
    """The metadata that the hub reads; local folders are left out."""
    return ModelCardData(
        library_name="peft" if model.is_adapter else "transformers",
        base_model=None if _is_local(model.base_model) else model.base_model,
        datasets=[model.dataset] if model.dataset and not _is_local(model.dataset) else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *model.tags],
    )


def _introduction(model: TrainedModel) -> str:
    what = "An adapter for" if model.is_adapter else "All weights of"
    data = f" of {_shown(model.dataset)}" if model.dataset else ""
    return (
        f"{what} {_shown(model.base_model)}, aligned with {model.pairs:,} preference pairs{data} "
        f"in {model.updates:,} updates by Direct Preference Optimization "
        f"([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)), with fastdpo {__version__}.\n\n"
        f"{' '.join(printable(model.reference).split())}"
    )


def _options(args: DPOConfig) -> dict[str, Any]:
    """The options to list: loss and run always, other options of DPO where not the default."""
    shown: dict[str, Any] = {"loss_type": args.loss_type, "beta": args.beta}
    for entry in fields(PreferenceOptions):
        value = getattr(args, entry.name)
        if entry.name not in (*shown, *_PATHS) and value != _default(entry):
            shown[entry.name] = value
    shown["pairs per update"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    return shown | {name: getattr(args, name) for name in (length, *_RUN)}


def _metrics(evaluation: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names and values of the metrics in the order of logging, without times and counters."""
    left_out = ("runtime", "per_second", "epoch", "step")
    return [
        (name.removeprefix("eval_"), f"{value:.4g}")
        for name, value in evaluation.items()
        if isinstance(value, int | float) and not name.endswith(left_out)
    ]


def _without_secrets(command: Sequence[str]) -> list[str]:
    """The arguments of a command without tokens."""
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word in _SECRETS:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in _SECRETS)):
            kept.append(word)
    return kept


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: Any) -> str:
    values = value if isinstance(value, list | tuple) else [value]
    text = " ".join(str(each.value if isinstance(each, Enum) else each) for each in values)
    return _plain(text).replace("|", "\\|").replace("<", "&lt;")


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _is_local(name: str) -> bool:
    return Path(name).exists() or Path(name).is_absolute() or name.count("/") > 1


def _shown(name: str) -> str:
    """A model's or data set's name for the text: of a local folder the last part alone."""
    if not name:
        return "a model that has no name"
    return f"`{_plain(Path(name).name if _is_local(name) else name)}`"


def _plain(text: str) -> str:
    """A name on one line, without what would end its place in Markdown or move a cursor."""
    return " ".join(printable(text).replace("`", "'").split())
