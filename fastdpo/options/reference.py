"""The options that say what the reference is and where its log-probs are kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastdpo.options.checks import Options, number, option, whole


@dataclass
class ReferenceOptions(Options):
    """The options of the reference and of its store."""

    _argument_group_name = "Reference"

    reference: str | None = option(
        None,
        "What the policy is compared with: adapter, a frozen copy of the adapter that training "
        "starts from; base, the model with all adapters off; or the folder or hub id of a model or "
        "adapter, or from Python the name of another adapter of the model. Unset: one that is "
        "called reference, else adapter where training starts from a trained one, else base.",
    )
    ref_cache: str | None = option(
        None,
        "Folder of the stored reference log-probs, or off to compute the reference in each update. "
        "Unset: $FASTDPO_CACHE, $XDG_CACHE_HOME/fastdpo or ~/.cache/fastdpo, in reference/.",
    )
    ref_token_logps: str = option(
        "on",
        "on stores the reference log-prob of every token beside their sum, 4 bytes each, which "
        "--ld_alpha needs and the spot check compares; off stores the sums alone.",
        choices=["on", "off"],
    )
    ref_versions: str = option(
        "warn",
        "Stored reference log-probs that other library versions or another GPU computed: warn "
        "uses them, as they differ in rounding alone, and says so; strict computes them again.",
        choices=["warn", "strict"],
    )
    ref_spot_check: int = option(
        4,
        "Stored pairs to score again before they are believed; a run stops where they differ by "
        "more than rounding. A few show a wrong store at the cost of a second; 0 does not look.",
        check=whole(0, "4 is usual, 0 does not look"),
    )
    first_margin: str = option(
        "stop",
        "What follows where policy and reference are one at the start (no dropout, no other "
        "reference, not resumed) and the first update shows otherwise: stop, since the reference "
        "or the policy is wrong, or warn.",
        choices=["stop", "warn"],
    )
    sync_ref_model: bool = option(
        False,
        "TR-DPO: move the reference towards the policy during training. It is then computed in "
        "each update and never stored.",
    )
    ref_model_mixup_alpha: float = option(
        0.6,
        "With sync_ref_model: the policy's share, above 0 and at most 1, in the new reference; 0.6 "
        "as in TRL and the paper.",
        check=number("0.6 is usual, 1 takes the policy itself.", above=0, at_most=1),
    )
    ref_model_sync_steps: int = option(
        512,
        "With sync_ref_model: updates from one move of the reference to the next.",
        check=whole(1, "512 is usual"),
    )

    def __post_init__(self) -> None:
        if self.ref_cache is not None:
            self.ref_cache = os.fspath(self.ref_cache)
            if not self.ref_cache.strip():
                raise ValueError("--ref_cache is empty; give a folder, off, or leave it out.")
        super().__post_init__()
        if not self.sync_ref_model:
            for name, unset in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"--{name} is {getattr(self, name)}, but the reference stands still: add "
                        "--sync_ref_model, or leave it out."
                    )


def reference_folder(ref_cache: str | None) -> Path | None:
    """Return the folder of the reference stores for a value of `--ref_cache`; None means off.

    Raises:
        ValueError: it lies in the home folder, and this user has none.
    """
    if ref_cache == "off":
        return None
    if ref_cache is None:
        return cache_folder() / "reference"
    return _in_home(ref_cache)


def data_folder(data_cache: str | None) -> Path | None:
    """Return the folder of prepared pairs for a value of `--data_cache`; None means off.

    Raises:
        ValueError: it lies in the home folder, and this user has none.
    """
    if data_cache == "off":
        return None
    return cache_folder() / "data" if data_cache is None else _in_home(data_cache)


def cache_folder() -> Path:
    """The folder for what outlives a run: $FASTDPO_CACHE, or fastdpo in the user's cache."""
    if cache := os.environ.get("FASTDPO_CACHE"):
        return _in_home(cache)
    return _in_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastdpo"


def _in_home(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{folder} lies in the home folder, and this user has none (HOME is not set): pass "
            "--ref_cache FOLDER and --data_cache FOLDER, or off, or set FASTDPO_CACHE."
        ) from error
