"""The options of the commands that compare a trained model with its reference."""

from dataclasses import dataclass, fields

from fastdpo.options.checks import Options, number, option
from fastdpo.options.data import DataOptions
from fastdpo.options.model import ModelOptions
from fastdpo.options.passes import BASE_WEIGHTS, KERNELS


@dataclass
class ComparisonOptions(Options):
    """The options that say which trained model is compared with which reference."""

    _argument_group_name = "Policy and reference"

    adapter: str | None = option(
        None, "Folder of the trained adapter; the reference is the model without it."
    )
    reference: str | None = option(
        None, "The model that a fully trained --model started from, to compare with."
    )
    beta: float = option(
        0.1,
        "Reward per nat of log-ratio, as in training.",
        check=number("Pass the beta of the training run.", above=0),
    )

    kernels: str = option(
        "auto", "What computes the layers, as in training.", choices=list(KERNELS)
    )
    base_weights: str = option(
        "gpu",
        "Where the models' matrices lie: gpu, or host, from whose memory they come layer by layer; "
        "auto: host where they do not fit on the GPU.",
        choices=list(BASE_WEIGHTS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and self.reference is not None:
            raise ValueError(
                "--adapter and --reference exclude each other: with an adapter the reference is "
                "the model without it; --reference is for a --model whose weights were all trained."
            )


LOADING = {
    ModelOptions: {"model_name_or_path", "model_revision", "dtype", "trust_remote_code", "qlora"},
    DataOptions: {
        "dataset_name",
        "dataset_config",
        "dataset_test_split",
        "eval_dataset",
        "columns",
        "rated_pairs",
        "max_line_mib",
    },
}
"""The options that a command that trains nothing takes of the groups it shares with training."""

TRAINING_OPTIONS = frozenset(
    entry.name for kind, used in LOADING.items() for entry in fields(kind) if entry.name not in used
)
"""The options that such a command would ignore; `parse` refuses them."""
