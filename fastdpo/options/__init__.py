"""Our own options: dataclasses with their checks, the presets of the commands, model aliases.

Only the standard library is imported, so that `--help` is quick and any other room may read this.
Every field's help says what it is, in which unit, and why its default is what it is; help texts
go through argparse, so they hold no percent sign.
"""

from fastdpo.options.comparison import (
    TRAINING_OPTIONS,
    ComparisonOptions,
)
from fastdpo.options.data import DEFAULT_DATASET, DataOptions
from fastdpo.options.losses import (
    COUPLED_LOSSES,
    LOSS_TYPES,
    REFERENCE_FREE_LOSSES,
    LossOptions,
)
from fastdpo.options.model import MODEL_ALIASES, ModelOptions, resolve_model
from fastdpo.options.passes import BatchingOptions
from fastdpo.options.preference import DPO_OPTION_GROUPS, PreferenceOptions
from fastdpo.options.reference import (
    ReferenceOptions,
    cache_folder,
    data_folder,
    reference_folder,
)
from fastdpo.options.rows import SPECIAL_TOKEN_MODES, TRUNCATION_MODES, TokenizationOptions
from fastdpo.options.running import COMMAND_DEFAULTS, TrainerDefaults, presets
from fastdpo.options.trl import TrlOptions

__all__ = [
    "COMMAND_DEFAULTS",
    "ComparisonOptions",
    "DataOptions",
    "LossOptions",
    "ModelOptions",
    "DPO_OPTION_GROUPS",
    "BatchingOptions",
    "PreferenceOptions",
    "ReferenceOptions",
    "TokenizationOptions",
    "TrainerDefaults",
    "TrlOptions",
    "COUPLED_LOSSES",
    "DEFAULT_DATASET",
    "LOSS_TYPES",
    "MODEL_ALIASES",
    "REFERENCE_FREE_LOSSES",
    "SPECIAL_TOKEN_MODES",
    "TRAINING_OPTIONS",
    "TRUNCATION_MODES",
    "presets",
    "cache_folder",
    "data_folder",
    "reference_folder",
    "resolve_model",
]
