"""The planner: predicts the memory of a run and chooses how it fills the GPU; allocates nothing.

`architecture` counts a model from its config, `terms` and `activations` are the formulas,
`search` makes a `Plan` of them, `gpus` and `speed` tell what a GPU has and how fast it is.
"""

from fastdpo.planner.architecture import (
    Architecture,
    UnplannableError,
    architecture_named,
    architecture_of,
)
from fastdpo.planner.from_model import pinnable_host_bytes, plan_for_run, training_of
from fastdpo.planner.gpus import GPUSpec, current_gpu, gpu_spec
from fastdpo.planner.plan import Plan, compare
from fastdpo.planner.search import longest_pair, make_plan
from fastdpo.planner.terms import Training
from fastdpo.planner.workload import Workload

__all__ = [
    "Architecture",
    "GPUSpec",
    "Plan",
    "Training",
    "UnplannableError",
    "Workload",
    "architecture_named",
    "architecture_of",
    "gpu_spec",
    "compare",
    "longest_pair",
    "pinnable_host_bytes",
    "make_plan",
    "plan_for_run",
    "training_of",
    "current_gpu",
]
