"""The options that say which preference pairs are read, from one set or from several."""

from dataclasses import dataclass, fields
from typing import Any

from fastdpo.options.checks import Options, check_choice, number, option, whole

DEFAULT_DATASET = "trl-lib/ultrafeedback_binarized"
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "question": ("question", "instruction", "query"),
    "input": ("input",),
    "history": ("history",),
    "conversations": ("conversations", "conversation", "messages", "context"),
    "system": ("system", "system_prompt"),
    "answer_start": ("initial_reason_steps",),
    "chosen": (
        "chosen", "chosen_response", "preferred", "accepted", "response_j", "chosen_messages",
        "chosen_answer", "preferred_response", "better_response", "response_chosen",
        "accepted_answer", "response_w", "y_w",
    ),
    "rejected": (
        "rejected", "rejected_response", "dispreferred", "response_k", "rejected_messages",
        "rejected_answer", "dispreferred_response", "worse_response", "response_rejected",
        "non_preferred", "response_l", "y_l",
    ),
    "completions": ("completions", "responses", "answers", "generations", "outputs"),
    "ratings": ("ratings", "rating", "scores", "rewards"),
    "ranks": ("ranks",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}  # fmt: skip
"""Role -> the column names that are known for it.

A role is what a column can be to a preference row, and a name that --columns takes on its left.
`answer_start` is the beginning that both answers share.
"""
NO_COLUMN = "none"
"""The word that --columns takes on its right where a set has no column of a role: prompt=none."""
RATED_PAIRS = ("best_worst", "all")


@dataclass
class DataOptions(Options):
    """The options that say which preference pairs are read, and how their columns are taken."""

    _argument_group_name = "Data"

    dataset_name: str | None = option(
        None,
        "JSONL, JSON, CSV, Parquet or Arrow file, folder, or hub id of the preference pairs.",
        aliases=["--dataset"],
    )
    dataset_config: str | None = option(None, "Configuration of the hub dataset, if any.")
    dataset_train_split: str = option(
        "train", "Split to train on; a slice such as train[:1000] takes a part of it."
    )
    dataset_test_split: str = option("test", "Split to evaluate on, where the dataset has it.")
    eval_dataset: str | None = option(
        None, "File, folder or hub id to evaluate on instead of the test split."
    )
    max_line_mib: int = option(
        16,
        "Longest line of a JSONL file, MiB; a longer one is rarely a pair.",
        check=whole(1, "16 is usual"),
    )
    columns: list[str] | None = option(
        None,
        "Which column is what, as in prompt=question chosen=good rejected=bad, where no name is "
        "recognised. question=NAME makes a user turn, prompt=NAME ready text; prompt=none: there "
        "is none.",
    )
    rated_pairs: str = option(
        "best_worst",
        "Several rated completions to a prompt: best_worst makes one pair of them, all makes a "
        "pair of every two that are rated differently.",
        choices=list(RATED_PAIRS),
    )
    dataset_streaming: bool = option(
        False,
        "Read the dataset as a stream and only as many rows as --max_steps needs.",
        aliases=["--streaming"],
    )
    datasets: list[dict[str, Any]] | None = option(
        None,
        "A mixture, in the YAML file: a list with path, name, data_dir, data_files, split, columns "
        "and fraction for each dataset.",
    )
    test_split_size: float | None = option(
        None, "Of a mixture: below 1 the share, from 1 on the rows that are held out."
    )
    mixture_seed: int | None = option(
        None,
        "Of a mixture: seed that draws the rows of a fraction and of the held-out part. Unset: a "
        "fraction takes the first rows as in TRL, and the held-out part is drawn with seed 0.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None:
            column_roles(self.columns)
        if self.datasets is None and (
            self.test_split_size is not None or self.mixture_seed is not None
        ):
            raise ValueError(
                "--test_split_size and --mixture_seed are of a mixture, and no datasets are given; "
                "list them in the YAML file, or use --dataset_train_split and --dataset_test_split."
            )
        if self.datasets is not None and self.columns is not None:
            raise ValueError(
                "--columns is for one dataset; in a mixture each entry has its own `columns`."
            )
        _ = self.mixture

    @property
    def reading(self) -> dict[str, Any]:
        """Keyword arguments of `fastdpo.data.read_rows`, the same for every set that is read."""
        return {
            "columns": column_roles(self.columns),
            "rated_pairs": self.rated_pairs,
            "max_line_mib": self.max_line_mib,
        }

    @property
    def mixture(self) -> "DatasetMixtureConfig | None":
        """The mixture that `datasets` lists, or None."""
        if self.datasets is None:
            return None
        return DatasetMixtureConfig(
            datasets=[_dataset_config(entry) for entry in self.datasets],
            streaming=self.dataset_streaming,
            test_split_size=self.test_split_size,
            mixture_seed=self.mixture_seed,
        )


@dataclass
class DatasetConfig:
    """One data set of a mixture; names and meaning as in TRL.

    Attributes:
        path: file, folder or hub id.
        name: configuration of a hub set.
        data_dir: folder inside the set.
        data_files: files of the set.
        split: which part, slices included.
        columns: names of the columns to keep, or what they are (`{"prompt": "question"}`).
        fraction: share of this set in the mixture; the shares of all sets are normalised to one,
            and the mixture is as large as it can be without any row twice.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str = "train"
    columns: Any = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(
                f"--datasets: the path of a dataset is {self.path!r}; it must be the name of a "
                "file, a folder or a set on the hub."
            )
        if self.fraction is not None:
            number("It is a share.", at_least=0)("datasets fraction", self.fraction)


@dataclass
class DatasetMixtureConfig(Options):
    """Several data sets as one; names as in TRL.

    Attributes:
        datasets: `DatasetConfig`s, or dicts of their fields.
        streaming: read them as streams.
        test_split_size: below 1 the share, from 1 on the number of rows that are held out.
        mixture_seed: draws the rows of a fraction; None takes the first ones, as TRL does.
    """

    datasets: list[DatasetConfig] = option([], "The data sets of the mixture.")
    streaming: bool = option(False, "Read the datasets as streams.")
    test_split_size: float | None = option(
        None,
        "Below 1 the share, from 1 on the number of rows that are held out.",
        check=number("0.05 is usual.", above=0),
    )
    mixture_seed: int | None = option(
        None, "Seed that draws the rows of a fraction; unset takes the first ones."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.datasets = [_dataset_config(entry) for entry in self.datasets]
        fractions = [entry.fraction for entry in self.datasets if entry.fraction is not None]
        if fractions and len(fractions) < len(self.datasets):
            raise ValueError(
                f"--datasets: {len(fractions)} of {len(self.datasets)} have a fraction; give one "
                "to every dataset of the mixture, or to none."
            )
        if fractions and not sum(fractions):
            raise ValueError("--datasets: every fraction is 0, so no row is taken; raise one.")
        if fractions and self.streaming:
            raise ValueError(
                "--datasets: a fraction needs the number of rows, which a stream does not tell; "
                "leave dataset_streaming off, or give no fraction."
            )
        if self.test_split_size is not None:
            size = self.test_split_size
            if self.streaming:
                raise ValueError(
                    "--test_split_size: a stream has no end to hold rows out from; leave "
                    "dataset_streaming off, or pass --eval_dataset."
                )
            if size >= 1 and size != int(size):
                raise ValueError(
                    f"--test_split_size is {size!r}; above 1 it is a number of rows: round it."
                )


@dataclass
class ScriptArguments(Options):
    """The data options under the names of TRL's scripts."""

    dataset_name: str | None = option(None, "File, folder or hub id of the preference pairs.")
    dataset_config: str | None = option(None, "Configuration of the hub dataset, if any.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    dataset_streaming: bool = option(False, "Read the dataset as a stream.")
    ignore_bias_buffers: bool = option(False, "Of distributed runs; must stay off.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_bias_buffers:
            raise ValueError(
                "--ignore_bias_buffers served a wrapper of distributed runs that fastdpo does not "
                "use; leave it out."
            )


def column_roles(columns: Any) -> dict[str, str]:
    """Read the roles of columns, `["prompt=question", ...]` or a dict, as role -> column name.

    Raises:
        ValueError: a word that is no `role=name`, an unknown role, or one given twice.
    """
    if isinstance(columns, dict):
        pairs = [(str(role), str(name)) for role, name in columns.items()]
    else:
        pairs = []
        for word in columns or ():
            role, equals, name = str(word).partition("=")
            if not equals or not name:
                raise ValueError(
                    f"--columns has {word!r}; write role=column, as in prompt=question."
                )
            pairs.append((role, name))
    roles = dict(pairs)
    for role in roles:
        check_choice("columns", role, COLUMN_NAMES)
    names = [name for name in roles.values() if name != NO_COLUMN]
    if len(roles) < len(pairs) or len(set(names)) < len(names):
        raise ValueError(f"--columns names something twice ({columns}); name each one once.")
    return roles


def _dataset_config(entry: Any) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    known = [each.name for each in fields(DatasetConfig)]
    if not isinstance(entry, dict):
        raise ValueError(
            f"--datasets has {entry!r}; each entry needs keys, as in path: file.jsonl "
            f"(known: {', '.join(known)})."
        )
    for name in entry:
        if name not in known:
            raise ValueError(f"--datasets has the key {name!r}; known are {', '.join(known)}.")
    if "path" not in entry:
        raise ValueError("--datasets has an entry without a path; name a file, folder or hub set.")
    return DatasetConfig(**entry)
