"""Our own options: dataclasses with their checks, the presets of the commands, model aliases.

Only the standard library is imported, so that `--help` is quick and any other room may read this.
Every field's help says what it is, in which unit, and why its default is what it is; help texts
go through argparse, so they hold no percent sign.
"""

from fastdpo.options.data import DEFAULT_DATASET, DataOptions
from fastdpo.options.evaluation import EvaluationOptions
from fastdpo.options.losses import LOSS_TYPES, LossOptions
from fastdpo.options.model import MODEL_ALIASES, ModelOptions, resolve_model
from fastdpo.options.passes import PassOptions
from fastdpo.options.preference import PARTS, PreferenceOptions
from fastdpo.options.reference import ReferenceOptions, reference_folder
from fastdpo.options.rows import SPECIAL_TOKEN_MODES, TRUNCATION_MODES, RowOptions
from fastdpo.options.running import RunOptions, presets

__all__ = [
    "DataOptions",
    "EvaluationOptions",
    "LossOptions",
    "ModelOptions",
    "PARTS",
    "PassOptions",
    "PreferenceOptions",
    "ReferenceOptions",
    "RowOptions",
    "RunOptions",
    "DEFAULT_DATASET",
    "LOSS_TYPES",
    "MODEL_ALIASES",
    "SPECIAL_TOKEN_MODES",
    "TRUNCATION_MODES",
    "presets",
    "reference_folder",
    "resolve_model",
]
