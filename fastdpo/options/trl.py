"""The options of `trl.DPOConfig` that fastdpo takes over in its own way."""

from dataclasses import dataclass

from fastdpo.options.checks import Options, option, whole

_ONE_OR_MORE = whole(1, "it is not needed here, leave it out")


@dataclass
class TrlOptions(Options):
    """The options of `trl.DPOConfig` 1.16 that happen here anyway, or that have no use here."""

    _argument_group_name = "Names of TRL"

    trust_remote_code: bool = option(
        False,
        "Run Python code that the repository of a model or tokenizer given by name ships; off, "
        "since it can do anything.",
    )
    precompute_ref_log_probs: bool = option(
        False, "What happens anyway: reference log-probs are computed once and stored (ref_cache)."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Not used: micro_batch_tokens bounds the reference pass too.", check=_ONE_OR_MORE
    )
    padding_free: bool = option(
        False, "What happens anyway: pairs are packed without padding, whatever is given here."
    )
    pad_to_multiple_of: int | str | None = option(
        "auto", "Not used: nothing is padded.", check=_ONE_OR_MORE
    )
    pad_token: str | None = option(None, "Not used: nothing is padded.")
    activation_offloading: bool = option(False, "TRL's name of activations with the value offload.")

    def __post_init__(self) -> None:
        multiple = self.pad_to_multiple_of
        if isinstance(multiple, str):
            unset = multiple.lower() in ("auto", "none", "null")
            self.pad_to_multiple_of = None if unset else _as_whole(multiple)
        super().__post_init__()


def _as_whole(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
