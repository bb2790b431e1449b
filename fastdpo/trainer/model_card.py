"""The model card: which model was trained, on which data, with which options and result."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from peft import PeftModel

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
        pairs_seen: how often one of them was in an update; each counts as often as it was.
        updates: number of updates that were done.
        dataset: folder, file or hub id of the pairs, if known.
        evaluation: metrics of the last evaluation by their logged names; empty without one.
        command: the arguments that started the run, if it was a command.
        adapter: kind and rank of the adapter; empty without one.
        license: of the base model, as the hub names it; None if it is not known.
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
    pairs_seen: int
    updates: int
    dataset: str | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    command: Sequence[str] = ()
    adapter: str = ""
    license: str | None = None
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: str | None = None


def library_versions() -> dict[str, str]:
    """The versions of Python, fastdpo and the libraries that a result depends on, by name."""
    return {"fastdpo": __version__, "python": platform.python_version()} | {
        name: version(name) for name in _LIBRARIES
    }


def describe_adapter(policy: Any) -> str:
    """Kind, rank and alpha of the adapter that a policy trains; empty for all weights."""
    if not isinstance(policy, PeftModel):
        return ""
    config = policy.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    named = {"rank": getattr(config, "r", None), "alpha": getattr(config, "lora_alpha", None)}
    return ", ".join([kind, *(f"{name} {value}" for name, value in named.items() if value)])


def model_card(model: TrainedModel) -> str:
    """The README.md of a trained model: YAML front matter for the hub, then Markdown.

    Local folders appear by their last name alone, and never as a base_model or dataset of the hub;
    tokens in the command are left out.
    """
    parts = [
        f"---\n{_front_matter(model).to_yaml()}\n---",
        f"# {_plain(model.name).replace('<', '&lt;')}",
        _introduction(model),
        "## Training\n\n" + _table(("Option", "Value"), _training(model).items()),
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
    parts.append(f"## License\n\n{_license(model)}")
    parts.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _front_matter(model: TrainedModel) -> ModelCardData:
    """The metadata that the hub reads; local folders are left out."""
    return ModelCardData(
        library_name="peft" if model.is_adapter else "transformers",
        license=model.license,
        base_model=None if _is_local(model.base_model) else model.base_model,
        datasets=[model.dataset] if model.dataset and not _is_local(model.dataset) else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *model.tags],
    )


def _introduction(model: TrainedModel) -> str:
    what = "An adapter for" if model.is_adapter else "All weights of"
    data = f" of {_shown(model.dataset)}" if model.dataset else ""
    return (
        f"{what} {_shown(model.base_model)}, aligned with {_count(model)} preference pairs{data} "
        f"in {model.updates:,} updates by Direct Preference Optimization "
        f"([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)), with fastdpo {__version__}.\n\n"
        f"{' '.join(printable(model.reference).split())}"
    )


def _count(model: TrainedModel) -> str:
    """The number of pairs, and of how many, where the run ended before it had seen each."""
    seen = min(model.pairs_seen, model.pairs)
    return f"{seen:,}" if seen == model.pairs else f"{seen:,} of {model.pairs:,}"


def _license(model: TrainedModel) -> str:
    base = _shown(model.base_model)
    if model.license is None:
        return f"What comes of {base} is under its license, which is not known here: look there."
    return f"What comes of {base} is under its license, {_plain(model.license)}."


def license_of(base_model: str) -> str | None:
    """The license that the card of a base model names, if the card lies on this machine.

    Args:
        base_model: a local folder, or a hub id.
    """
    card: Any = Path(base_model) / "README.md"
    if not Path(base_model).is_dir():
        try:
            card = try_to_load_from_cache(base_model, "README.md")
        except ValueError:  # no name that the hub could have
            return None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        named = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return named if isinstance(named, str) else None


def _training(model: TrainedModel) -> dict[str, Any]:
    """The base, the pairs and the adapter that were trained, and the options to list."""
    shown = {
        "base model": _shown(model.base_model).strip("`"),
        "pairs seen": f"{model.pairs_seen:,}",
    }
    return shown | ({"adapter": model.adapter} if model.adapter else {}) | _options(model.args)


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
