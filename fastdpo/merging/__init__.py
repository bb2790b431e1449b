"""An adapter into its base: file by file of the base's weights, never the whole model."""

from fastdpo.merging.adapter import Adapter, read_adapter
from fastdpo.merging.base import Base, find_base
from fastdpo.merging.folder import (
    MergedModel,
    claim_folder,
    finish_folder,
    hold_folder,
    write_folder,
)
from fastdpo.merging.plan import MergePlan, plan_merge

__all__ = [
    "Adapter",
    "Base",
    "MergePlan",
    "MergedModel",
    "claim_folder",
    "find_base",
    "finish_folder",
    "hold_folder",
    "plan_merge",
    "read_adapter",
    "write_folder",
]
