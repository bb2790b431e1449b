"""Which loss is taken over a pair, and its parameters."""

from dataclasses import dataclass, field

from fastdpo.options.checks import check_number, option

LOSS_TYPES = ("sigmoid",)


@dataclass
class LossOptions:
    """The loss of a pair."""

    _argument_group_name = "Loss"

    beta: float = option(
        0.1,
        "Reward per nat of log-ratio; higher holds the policy nearer to the reference. 0.1 as in "
        "TRL and most recipes.",
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"Loss of a pair; built today: {', '.join(LOSS_TYPES)}."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if not self.loss_type or not all(name in LOSS_TYPES for name in self.loss_type):
            raise ValueError(
                f"--loss_type is {' '.join(map(str, self.loss_type)) or 'empty'}; built today: "
                f"{', '.join(LOSS_TYPES)}. Leave it out to use sigmoid."
            )
        if len(self.loss_type) > 1:
            raise ValueError("--loss_type names several losses; a sum is not built, name one.")
        check_number(
            "beta", self.beta, above=0, remedy="0.1 is usual; less lets the policy move further."
        )
