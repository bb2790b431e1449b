"""The options of running the model over the pairs of an update: micro-batches, memory, dropout."""

from dataclasses import dataclass
from typing import Any

from fastdpo.options.checks import Options, as_dict, option, whole
from fastdpo.options.removed import present_value

ATTENTION_BACKENDS = ("auto", "sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3")
KERNELS = ("auto", "fused", "eager")
BASE_WEIGHTS = ("gpu", "host", "auto")
ACTIVATION_MODES = ("auto", "keep", "keep_attention", "recompute", "offload")


@dataclass
class BatchingOptions(Options):
    """The options of micro-batches and of memory."""

    _argument_group_name = "Micro-batches and memory"

    micro_batch_tokens: int | None = option(
        None,
        "Most tokens of a packed micro-batch, at least 128; bounds the memory, never changes the "
        "update. Unset: chosen for the device.",
        check=whole(128, "leave it out to choose"),
    )
    activations: str = option(
        "auto",
        "What each layer leaves for the backward: keep everything (fastest), recompute from its "
        "input, keep_attention beside that input, or offload it to host memory. auto: layer by "
        "layer as the GPU has room.",
        choices=list(ACTIVATION_MODES),
    )
    mlp_tile_tokens: int | None = option(
        None,
        "Run MLPs and norms over at most so many tokens at once, 128 or more, to hold less of "
        "their inside; 0 never does. Unset: chosen for the device.",
        check=whole(128, "0 is never, 4096 is usual", or_zero=True),
    )
    dequantize: str = option(
        "auto",
        "How often a recomputed layer's 4-bit weights are dequantized for its backward: once holds "
        "the dense copies of one layer, twice of one matrix. auto: once where the GPU has room.",
        choices=["auto", "once", "twice"],
    )
    embeddings: str = option(
        "auto",
        "Where the embedding rows lie: GPU, or host, which frees as much as the table is large "
        "where it is frozen and not shared with the head. auto: host where the GPU is full.",
        choices=["auto", "gpu", "host"],
    )
    base_weights: str = option(
        "gpu",
        "Where the frozen matrices below an adapter lie: gpu, or host, from whose memory they come "
        "layer by layer while others compute; of 16 or 4 bits. auto: host where they do not fit on "
        "the GPU, or where that is faster. No number changes.",
        choices=list(BASE_WEIGHTS),
    )
    shared_prefix: str = option(
        "auto",
        "auto computes the prompt of a pair once for both completions where that is exact; off "
        "computes it once per completion.",
        choices=["auto", "off"],
    )
    packing: str = option(
        "auto",
        "auto lays completions one after another without padding where the model can do that "
        "exactly; off gives every completion a padded sequence and shares nothing.",
        choices=["auto", "off"],
    )
    attention: str = option(
        "auto",
        "What attends over packed pairs. auto: varlen (flash attention in torch) where it can, "
        "flex for capped scores and sinks, sdpa elsewhere; flash_attention_2 and 3 need their "
        "packages.",
        choices=list(ATTENTION_BACKENDS),
    )
    kernels: str = option(
        "auto",
        "What computes norms, rotary embeddings, activations and LoRA: fused ops where "
        "the model's family is known, or eager, transformers' own modules. auto: fused on a GPU "
        "that runs the Triton kernels.",
        choices=list(KERNELS),
    )
    disable_dropout: bool = option(
        True,
        "Turn the model's own dropout off, which would blur policy against reference.",
    )
    nonfinite: str = option(
        "stop",
        "What follows a loss or gradient that is not finite; either way no weight changes: stop "
        "ends the run and names the rows, skip goes on with the next update and counts.",
        choices=["stop", "skip"],
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "More arguments for from_pretrained, as a dict or JSON."
    )

    def __post_init__(self) -> None:
        self.embeddings = present_value("embeddings", self.embeddings)
        self.model_init_kwargs = _loading(as_dict("model_init_kwargs", self.model_init_kwargs))
        super().__post_init__()
        if self.activations == "keep_attention" and self.attention == "flex":
            raise ValueError(
                "--activations keep_attention keeps what one attention kernel returns, which flex "
                "does not hand out: use --attention auto, or --activations recompute."
            )

    @property
    def from_pretrained_options(self) -> dict[str, Any]:
        """A copy of `model_init_kwargs`, the arguments for from_pretrained."""
        assert not isinstance(self.model_init_kwargs, str), "__post_init__ has read the JSON"
        return dict(self.model_init_kwargs or {})


def _loading(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Arguments for from_pretrained under their present names.

    Raises:
        ValueError: the dtype is given twice, or weights of 8 bits are requested.
    """
    given = dict(given or {})
    if "torch_dtype" in given:
        if "dtype" in given:
            raise ValueError(
                "--model_init_kwargs has dtype and torch_dtype, which are one: keep dtype."
            )
        given["dtype"] = given.pop("torch_dtype")
    quantization = given.get("quantization_config")
    in_dict = quantization if isinstance(quantization, dict) else {}
    if given.get("load_in_8bit") or in_dict.get("load_in_8bit"):
        raise ValueError(
            "--model_init_kwargs asks for load_in_8bit, and 8-bit weights are not built: use 4 "
            "bits (--qlora, or a BitsAndBytesConfig with load_in_4bit), or leave it out."
        )
    return given or None


def check_base_weights(base_weights: str, *, trains_adapter: bool) -> None:
    """Refuse to hold weights in host memory that are trained.

    Raises:
        ValueError: says what to pass.
    """
    if base_weights == "host" and not trains_adapter:
        raise ValueError(
            "--base_weights is host, and all weights are trained, which the optimizer needs on the "
            "GPU: leave it out, or train an adapter (--lora, --qlora), whose base never changes."
        )
