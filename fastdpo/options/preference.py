"""The options of DPO itself, put together of their parts."""

from dataclasses import dataclass

from fastdpo.options.losses import LossOptions
from fastdpo.options.passes import PassOptions
from fastdpo.options.reference import ReferenceOptions
from fastdpo.options.rows import RowOptions

PARTS = (LossOptions, RowOptions, PassOptions, ReferenceOptions)
"""In the order in which help shows them."""


@dataclass
class PreferenceOptions(LossOptions, RowOptions, PassOptions, ReferenceOptions):
    """The options of DPO itself; `DPOConfig` inherits them."""

    _argument_group_name = "Preference optimisation and its reference"

    def __post_init__(self) -> None:
        for part in PARTS:
            part.__post_init__(self)
