"""The planner: predicts the memory of a run and chooses how it fills the card; allocates nothing.

`architecture` counts a model from its config, `terms` and `activations` are the formulas,
`choosing` makes a `Plan` of them, `cards` and `speed` say what a card has and how fast it is.
"""

from fastdpo.planner.architecture import Architecture, architecture_named, architecture_of
from fastdpo.planner.from_model import free_host_bytes, plan_for_run, training_of
from fastdpo.planner.gpus import Card, card_of, this_card
from fastdpo.planner.plan import Plan, compare
from fastdpo.planner.search import Workload, longest_pair, plan
from fastdpo.planner.terms import Training

__all__ = [
    "Architecture",
    "Card",
    "Plan",
    "Training",
    "Workload",
    "architecture_named",
    "architecture_of",
    "card_of",
    "compare",
    "longest_pair",
    "free_host_bytes",
    "plan",
    "plan_for_run",
    "training_of",
    "this_card",
]
