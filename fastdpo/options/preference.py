"""The options of DPO itself, put together from their groups."""

from dataclasses import dataclass

from fastdpo.options.losses import LossOptions
from fastdpo.options.passes import BatchingOptions
from fastdpo.options.reference import ReferenceOptions
from fastdpo.options.rows import TokenizationOptions
from fastdpo.options.watching import WatchingOptions

DPO_OPTION_GROUPS = (
    LossOptions, TokenizationOptions, BatchingOptions, ReferenceOptions, WatchingOptions,
)  # fmt: skip
"""In the order in which help shows them."""


@dataclass
class PreferenceOptions(
    LossOptions, TokenizationOptions, BatchingOptions, ReferenceOptions, WatchingOptions
):
    """The options of DPO itself; `DPOConfig` inherits them."""

    _argument_group_name = "Preference optimisation and its reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_free and self.sync_ref_model:
            raise ValueError(
                "--sync_ref_model moves a reference, and --reference_free has none; leave one out."
            )
        stores = self.ref_cache != "off" and not self.sync_ref_model and not self.reference_free
        if self.ld_alpha is not None and self.ref_token_logps == "off" and stores:
            raise ValueError(
                "--ld_alpha weighs the reference's tokens too, and --ref_token_logps off does not "
                "store them; leave one of them out, or add --ref_cache off."
            )
