"""Which preference pairs are read."""

from dataclasses import dataclass

from fastdpo.options.checks import option

DEFAULT_DATASET = "trl-lib/ultrafeedback_binarized"


@dataclass
class DataOptions:
    """Which preference pairs are read."""

    _argument_group_name = "Data"

    dataset_name: str | None = option(
        None,
        "JSONL or Parquet file, folder, or hub id of the preference pairs.",
        aliases=["--dataset"],
    )
    dataset_config: str | None = option(None, "Configuration of the hub dataset, if any.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on, where the dataset has it.")
    eval_dataset: str | None = option(
        None, "File, folder or hub id to evaluate on instead of the test split."
    )
