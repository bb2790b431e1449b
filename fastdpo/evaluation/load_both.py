"""A trained model and its reference over the same pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.data import PairDataset, Rows, prepare_pairs, read_held_out
from fastdpo.modeling.adapters import (
    BASE_IN_4BIT,
    TRAINING_ARGUMENTS,
    adapters_disabled,
    base_model_name,
    load_adapter,
    replace_lora_forward,
)
from fastdpo.modeling.loading import load_model, load_tokenizer, resolve_dtype
from fastdpo.options import (
    ComparisonOptions,
    DataOptions,
    ModelOptions,
    TokenizationOptions,
    resolve_model,
)
from fastdpo.options.data import column_roles
from fastdpo.system.console import print_line

T = TypeVar("T")

TOKENIZER_CONFIG = "tokenizer_config.json"


def run_policy_and_reference(
    model: ModelOptions,
    options: ComparisonOptions,
    work: Callable[[PreTrainedModel | PeftModel, str], T],
) -> tuple[T, T]:
    """What `work` makes of the policy, and what it makes of the reference.

    Args:
        model: the model, its precision and where it comes from.
        options: an adapter, whose reference is the model without it; or the model that a fully
            trained one started from, which is loaded after the policy has left memory.
        work: called with a model and "policy" or "reference".

    Raises:
        ValueError: an option is missing, or a model cannot be had.
    """
    policy = load_policy(model, options)
    done = work(policy, "policy")
    if options.reference is None:
        with adapters_disabled(policy):
            return done, work(policy, "reference")
    del policy
    return done, work(load_weights(model, resolve_model(options.reference)[0]), "reference")


def load_policy(model: ModelOptions, options: ComparisonOptions) -> PreTrainedModel | PeftModel:
    """The trained model: a base with its adapter, or a model whose weights were all trained."""
    name = policy_name(model, options)
    if options.adapter is not None:
        _warn_quantization_mismatch(Path(options.adapter), model.qlora)
    policy = load_weights(model, name)
    return policy if options.adapter is None else load_adapter(policy, options.adapter)


def _warn_quantization_mismatch(adapter: Path, qlora: bool) -> None:
    """An adapter belongs to the very weights that it was trained over: 4-bit ones are others."""
    try:
        trained = json.loads((adapter / TRAINING_ARGUMENTS).read_text()).get(BASE_IN_4BIT, qlora)
    except (OSError, ValueError, AttributeError):
        return
    if trained != qlora:
        over, remedy = ("4-bit", "add") if trained else ("whole", "leave out")
        print_line(
            f"The adapter was trained over {over} weights and is now used over others, which "
            f"changes every log-prob: {remedy} --qlora for those of its training."
        )


def load_weights(model: ModelOptions, name: str) -> PreTrainedModel:
    """A model without adapters, in the precision that the options ask for."""
    loaded = load_model(
        name,
        dtype=resolve_dtype(model.dtype),
        load_in_4bit=model.qlora,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    replace_lora_forward(loaded)
    return loaded


def policy_name(model: ModelOptions, options: ComparisonOptions) -> str:
    """The folder or hub id of the policy's weights; by default what the adapter names.

    Raises:
        ValueError: there is no adapter there, or nothing says what to compare.
    """
    if options.adapter is None and options.reference is None:
        raise ValueError(
            "there is nothing to compare: pass --adapter (the folder that training wrote), or, for "
            "a --model whose weights were all trained, --reference (the model it started from)."
        )
    name = model.model_name_or_path
    if options.adapter is not None:
        named = base_model_name(options.adapter) if name is None else None
        name = name or named
    if name is None:
        raise ValueError("--model is missing: pass the folder of the trained model.")
    return resolve_model(name)[0]


def tokenizer_of(model: ModelOptions, options: ComparisonOptions) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter if one lies there, else that of the policy's weights."""
    name = policy_name(model, options)
    if model.model_name_or_path and (sentence := resolve_model(model.model_name_or_path)[1]):
        print_line(sentence)
    beside = options.adapter is not None and (Path(options.adapter) / TOKENIZER_CONFIG).is_file()
    return load_tokenizer(
        options.adapter if beside and options.adapter else name,
        revision="main" if beside else model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )


def read_pairs(
    data: DataOptions, options: TokenizationOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, PairDataset]:
    """The held-out rows that the options name, and their pairs; says what was dropped or cut.

    Raises:
        ValueError: no data set is named, or it cannot be read.
    """
    source = data.eval_dataset or data.dataset_name
    if source is None:
        raise ValueError("--dataset is missing: pass held-out pairs, a .jsonl file for example.")
    rows = read_held_out(
        source,
        split=data.dataset_test_split,
        config_name=data.dataset_config,
        columns=column_roles(data.columns),
        rated_pairs=data.rated_pairs,
        max_line_mib=data.max_line_mib,
    )
    pairs = pairs_of(rows, options, tokenizer)
    print_line(pairs.report.describe())
    return rows, pairs


def pairs_of(
    rows: Rows, options: TokenizationOptions, tokenizer: PreTrainedTokenizerBase
) -> PairDataset:
    """The pairs of the rows under the options."""
    return prepare_pairs(rows, tokenizer, options)


def sources_of(rows: Rows, pairs: PairDataset) -> list[Any]:
    """What the column `source` says of each pair, None where it says nothing; [] without it."""
    read: Any = rows.rows
    if hasattr(read, "column_names"):
        column = list(read["source"]) if "source" in read.column_names else []
    else:
        column = [row.get("source") for row in read]
    return [column[pair.row] for pair in pairs] if column else []
