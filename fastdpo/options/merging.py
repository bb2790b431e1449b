"""What an adapter is merged into, and how the result is checked."""

from dataclasses import dataclass

from fastdpo.options.checks import check_choice, check_whole, option

ONTO_MODES = ("bf16", "dequantized")


@dataclass
class MergingOptions:
    """What an adapter is merged into, and how the result is checked."""

    _argument_group_name = "Merging"

    adapter: str | None = option(None, "Folder of the trained adapter.")
    output_dir: str = option("merged", "Folder for the merged model; new, or empty.")
    onto: str = option(
        "bf16",
        "Weights that the adapter is added to: bf16 are those of the base as they are stored; "
        "dequantized sends every weight that --qlora holds in 4 bits there and back first, so "
        "that the adapter meets the weights it was trained on.",
        choices=list(ONTO_MODES),
    )
    overwrite: bool = option(
        False, "Replace an earlier result of this command in --output_dir; nothing else ever is."
    )
    report_pairs: int = option(
        8,
        "Pairs of --dataset on which log-probs before and after are compared; a few show what "
        "moved, and each costs three passes. 0 compares none.",
    )

    def __post_init__(self) -> None:
        check_choice("onto", self.onto, ONTO_MODES)
        check_whole("report_pairs", self.report_pairs, 0, "8 is usual, 0 compares none")
        if self.adapter is None:
            raise ValueError(
                "--adapter is missing: pass the folder that training with --lora or --qlora wrote."
            )
