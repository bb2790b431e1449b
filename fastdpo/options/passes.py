"""How the model is run over the pairs of an update: micro-batches, what is shared, dropout."""

from dataclasses import dataclass, field
from typing import Any

from fastdpo.options.checks import as_dict, check_choice, check_whole, option

SHARED_PREFIX_MODES = ("auto", "off")


@dataclass
class PassOptions:
    """Micro-batches and memory."""

    _argument_group_name = "Micro-batches and memory"

    micro_batch_tokens: int | None = option(
        None,
        "Most tokens of a packed micro-batch, at least 128; bounds the memory, never changes the "
        "update. Unset: chosen for the device.",
    )
    shared_prefix: str = option(
        "auto",
        "auto computes the prompt of a pair once for both completions where that is exact; off "
        "computes it once per completion.",
        choices=list(SHARED_PREFIX_MODES),
    )
    disable_dropout: bool = option(
        True,
        "Turn the model's own dropout off, which would blur policy against reference.",
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "More arguments for from_pretrained, as a dict or JSON."},
    )

    def __post_init__(self) -> None:
        if self.micro_batch_tokens is not None:
            check_whole(
                "micro_batch_tokens", self.micro_batch_tokens, 128, "leave it out to choose"
            )
        check_choice("shared_prefix", self.shared_prefix, SHARED_PREFIX_MODES)
        self.model_init_kwargs = as_dict("model_init_kwargs", self.model_init_kwargs)

    @property
    def from_pretrained_options(self) -> dict[str, Any]:
        """`model_init_kwargs` as the dict that it is from `__post_init__` on."""
        assert not isinstance(self.model_init_kwargs, str), "__post_init__ has read the JSON"
        return dict(self.model_init_kwargs or {})
