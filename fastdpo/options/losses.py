"""The options that say which loss is taken over a pair, with its parameters."""

from dataclasses import dataclass

from fastdpo.options.checks import Options, number, option

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "rso",
)
COUPLED_LOSSES = ("aot", "aot_unpaired")
"""Losses that sort over the pairs of an update."""

REFERENCE_FREE_LOSSES = ("sft", "simpo", "orpo")
"""Losses that never look at the reference."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

_SCORE_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "rso")
_SMOOTHED_LOSSES = (
    "sigmoid",
    "exo_pair",
    "robust",
    "aot",
    "aot_unpaired",
    "sigmoid_norm",
    "simpo",
)

# Names that other releases and trainers have, and what to ask for instead.
_FORMER_LOSSES = {
    "aot_pair": "aot_unpaired is its name now",
    "kto_pair": "TRL removed it; bco_pair and apo_zero treat both completions on their own too",
    "cdpo": "it is sigmoid with --label_smoothing above 0",
    "dpo": "it is sigmoid",
    "dpo_norm": "it is sigmoid_norm",
    "rpo": "it is --loss_type sigmoid sft --loss_weights 1.0 ALPHA",
    "sppo": "it is sppo_hard",
    "bco": "it is bco_pair",
    "nca": "it is nca_pair",
    "exo": "it is exo_pair",
}


@dataclass
class LossOptions(Options):
    """The options of the loss of a pair."""

    _argument_group_name = "Loss"

    beta: float = option(
        0.1,
        "Reward per nat of log-ratio; higher holds the policy nearer to the reference. 0.1 as in "
        "TRL and most recipes; it is tau in ipo, and simpo wants about 2.",
        check=number("0.1 is usual; less lets the policy move further.", above=0),
    )
    loss_type: list[str] = option(
        ["sigmoid"],
        f"Loss of a pair, or several to be added up: {', '.join(LOSS_TYPES)}. sigmoid is DPO.",
    )
    loss_weights: list[float] | None = option(
        None, "One weight for each loss of loss_type, as in 0.8 0.2 1.0 for MPO; unset: 1."
    )
    label_smoothing: float = option(
        0.0,
        "Probability that a pair is labelled the wrong way round, for "
        f"{', '.join(_SMOOTHED_LOSSES)}; sigmoid with it is cDPO. exo_pair needs it, 1e-3 is "
        "usual; robust takes less than 0.5.",
        check=number("0 is usual.", at_least=0, below=1),
    )
    f_divergence_type: str = option(
        "reverse_kl",
        f"Divergence from the reference, for {', '.join(_SCORE_LOSSES)}; reverse_kl is DPO.",
        choices=list(F_DIVERGENCES),
    )
    f_alpha_divergence_coef: float = option(
        0.5,
        "Alpha of alpha_divergence: 1 is reverse_kl, 0 is forward_kl.",
        check=number("0.5 is usual."),
    )
    discopop_tau: float = option(
        0.05,
        "Temperature of the discopop loss, above 0 and at most 1; 0.05 as in its paper.",
        check=number("0.05 is usual; above 1 the loss grows exponentially.", above=0, at_most=1),
    )
    simpo_gamma: float = option(
        0.5,
        "Margin of the simpo loss, in units of its reward; 0.5 as in TRL and LLaMA-Factory.",
        check=number("0.5 is usual.", at_least=0),
    )
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight, 0 to 1, of the tokens by which one completion of a pair is longer than "
        "the other, against a preference for length; unset: 1.",
        check=number("Unset is plain DPO.", at_least=0, at_most=1),
    )
    use_weighting: bool = option(
        False,
        "WPO: weigh each pair by how likely the policy itself is to write it, for pairs that "
        "another model wrote.",
    )
    reference_free: bool = option(
        False,
        "Take the reference log-probs as 0 and compute none; the policy is held to nothing then.",
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts, added to the loss; 0 leaves it "
        "out. Unset: what the model's config says.",
        check=number("0.001 is usual, 0 leaves it out.", at_least=0),
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        self._check_loss_types()
        self._check_loss_weights()
        self._check_label_smoothing()
        self._check_divergence()
        self._reject_unused()

    @property
    def weighs_tokens(self) -> bool:
        """True if the loss needs more of a completion than the sum of its tokens' log-probs.

        Then the reference log-probs of single tokens are needed too.
        """
        return self.ld_alpha is not None

    def _check_loss_types(self) -> None:
        if not self.loss_type:
            raise ValueError("--loss_type is empty; leave it out to use sigmoid.")
        for name in self.loss_type:
            if name in LOSS_TYPES:
                continue
            several = "separate several names by spaces"
            usual = several if "," in name else "leave it out to use sigmoid"
            advice = _FORMER_LOSSES.get(name, usual)
            raise ValueError(
                f"--loss_type is {name!r}: {advice}. The losses are {', '.join(LOSS_TYPES)}."
            )
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(
                f"--loss_type is {' '.join(self.loss_type)}, which names a loss twice; name it "
                "once and set its weight in --loss_weights."
            )
        coupled = [name for name in self.loss_type if name in COUPLED_LOSSES]
        if self.use_weighting and coupled:
            raise ValueError(
                f"--use_weighting cannot weigh --loss_type {coupled[0]}, which sorts chosen and "
                "rejected apart, so that its terms belong to no pair; leave one of them out."
            )

    def _check_loss_weights(self) -> None:
        if self.loss_weights is None:
            return
        self.loss_weights = list(self.loss_weights)
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"--loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} "
                f"losses ({' '.join(self.loss_type)}); give one weight for each of --loss_type."
            )
        for weight in self.loss_weights:
            number("1 is usual.", at_least=0)("loss_weights", weight)

    def _check_label_smoothing(self) -> None:
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            raise ValueError(
                f"--label_smoothing is {self.label_smoothing}, which --loss_type robust divides by "
                "1 - 2 x it; give less than 0.5. 0.1 is usual."
            )
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError(
                "--loss_type exo_pair takes the logarithm of --label_smoothing, which is 0; give "
                "it a value above 0. 1e-3 is usual."
            )

    def _check_divergence(self) -> None:
        allowed = (*_SCORE_LOSSES, *REFERENCE_FREE_LOSSES)
        others = [name for name in self.loss_type if name not in allowed]
        if self.f_divergence_type != "reverse_kl" and others:
            raise ValueError(
                f"--f_divergence_type {self.f_divergence_type} has no meaning for --loss_type "
                f"{' '.join(others)}, which is no function of the difference of two rewards. "
                f"Losses that take it: {', '.join(_SCORE_LOSSES)}."
            )

    def _reject_unused(self) -> None:
        """Refuse a parameter that the chosen losses do not read, since it would change nothing."""
        for name, unset, readers in (
            ("label_smoothing", 0.0, _SMOOTHED_LOSSES),
            ("f_divergence_type", "reverse_kl", _SCORE_LOSSES),
            ("discopop_tau", 0.05, ("discopop",)),
            ("simpo_gamma", 0.5, ("simpo",)),
            ("ld_alpha", None, tuple(name for name in LOSS_TYPES if name != "sft")),
        ):
            value = getattr(self, name)
            if value != unset and not set(self.loss_type) & set(readers):
                raise ValueError(
                    f"--{name} is {value}, which --loss_type {' '.join(self.loss_type)} does not "
                    f"look at; leave it out. It belongs to {', '.join(readers)}."
                )
        alpha = self.f_alpha_divergence_coef
        if alpha != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"--f_alpha_divergence_coef is {alpha}, which --f_divergence_type "
                f"{self.f_divergence_type} does not look at; use alpha_divergence or leave it out."
            )
