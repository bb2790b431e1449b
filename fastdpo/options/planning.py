"""Which card and which pairs a run is planned for."""

from dataclasses import dataclass

from fastdpo.options.checks import check_number, check_whole, option


@dataclass
class PlanningOptions:
    """Which card and which pairs the run is planned for."""

    _argument_group_name = "Plan"

    gpu: str = option(
        "auto",
        "The card: a size such as 24GiB, a name such as rtx-4090, or auto for what is free on "
        "this machine's.",
    )
    host_memory_gib: float | None = option(
        None,
        "Most pinned host memory, GiB; unset: a share of what is free on this machine.",
    )
    max_length: int = option(
        1024,
        "Most tokens of prompt + completion, as in training; the longest pair is taken to be two "
        "such rows that share nothing.",
    )
    pairs_per_update: int = option(
        32,
        "Pairs of an update; the average one is taken to be half as long as the longest.",
    )
    micro_batch_tokens: int | None = option(
        None, "Most tokens of a micro-batch, at least 128. Unset: chosen."
    )
    optim: str = option(
        "auto",
        "Optimizer; auto is adamw_torch_fused, or adamw_8bit where nothing else fits.",
    )
    longest_pairs: bool = option(
        True, "Show the longest pair that fits each size of card; off spares a second."
    )
    json: bool = option(False, "Print the plan as JSON and nothing else.")

    def __post_init__(self) -> None:
        if not self.gpu.strip():
            raise ValueError("--gpu is empty; it must be auto, a size such as 24GiB, or a name.")
        if self.host_memory_gib is not None:
            check_number(
                "host_memory_gib", self.host_memory_gib, at_least=0, remedy="0 pins nothing."
            )
        check_whole("max_length", self.max_length, 8, "1024 is usual")
        check_whole("pairs_per_update", self.pairs_per_update, 1, "32 is usual")
        if self.micro_batch_tokens is not None:
            check_whole(
                "micro_batch_tokens", self.micro_batch_tokens, 128, "leave it out to choose"
            )
