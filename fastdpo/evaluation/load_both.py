"""Loads a trained model and its reference, and the held-out pairs to compare them on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.data import PairDataset, Rows, cached_pairs, read_held_out
from fastdpo.modeling.adapters import (
    BASE_IN_4BIT,
    TRAINING_ARGUMENTS,
    adapters_disabled,
    base_model_name,
    load_adapter,
    read_adapter_config,
    replace_lora_forward,
)
from fastdpo.modeling.base_names import require_base
from fastdpo.modeling.fused import use_kernels
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
    fn: Callable[[PreTrainedModel | PeftModel, str], T],
) -> tuple[T, T]:
    """Call a function with the policy and then with the reference.

    Args:
        model: the base model or fully trained model, its precision and revision.
        options: names an adapter, whose reference is the model without it; or the model that a
            fully trained one started from, which is loaded after the policy is freed.
        fn: called with a model and "policy" or "reference".

    Returns:
        The results of both calls, policy first.

    Raises:
        ValueError: an option is missing, or a model cannot be loaded.
    """
    policy = load_policy(model, options)
    use_kernels(policy, options.kernels)
    result = fn(policy, "policy")
    if options.reference is None:
        with adapters_disabled(policy):
            return result, fn(policy, "reference")
    del policy
    reference = load_weights(model, resolve_model(options.reference)[0], options.base_weights)
    use_kernels(reference, options.kernels)
    return result, fn(reference, "reference")


def load_policy(model: ModelOptions, options: ComparisonOptions) -> PreTrainedModel | PeftModel:
    """Load the trained model: a base with its adapter, or a model with all weights trained."""
    name = policy_name(model, options)
    if options.adapter is not None:
        _warn_quantization_mismatch(Path(options.adapter), model.qlora)
    policy = load_weights(model, name, options.base_weights)
    return policy if options.adapter is None else load_adapter(policy, options.adapter)


def _warn_quantization_mismatch(adapter: Path, qlora: bool) -> None:
    """Warn if an adapter trained over 4-bit weights is used over others, or vice versa."""
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


def load_weights(model: ModelOptions, name: str, base_weights: str = "gpu") -> PreTrainedModel:
    """Load a model without adapters, in the precision of the options."""
    loaded = load_model(
        name,
        dtype=resolve_dtype(model.dtype),
        load_in_4bit=model.qlora,
        base_weights=base_weights,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    replace_lora_forward(loaded)
    return loaded


def policy_name(model: ModelOptions, options: ComparisonOptions) -> str:
    """The folder or hub id of the policy's weights; by default the one that the adapter names.

    Raises:
        ValueError: there is no adapter in its folder, or no option says what to compare.
    """
    if options.adapter is None and options.reference is None:
        raise ValueError(
            "there is nothing to compare: pass --adapter (the folder that training wrote), or, for "
            "a --model whose weights were all trained, --reference (the model it started from)."
        )
    name = model.model_name_or_path
    if options.adapter is not None:
        read_adapter_config(options.adapter)  # before anything is read or loaded
        if name is None:
            name = base_model_name(options.adapter)
            require_base(name, options.adapter)
    if name is None:
        raise ValueError("--model is missing: pass the folder of the trained model.")
    return resolve_model(name)[0]


def tokenizer_of(model: ModelOptions, options: ComparisonOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the adapter's folder if it has one, else that of the weights."""
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
    """Read the held-out rows that the options name, and print what was dropped or truncated.

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
    """Tokenize rows into pairs as the options say."""
    return cached_pairs(rows, tokenizer, options)


def sources_of(rows: Rows, pairs: PairDataset) -> list[Any]:
    """The value of the column `source` for each pair, None where a row has none; [] without it."""
    read: Any = rows.rows
    if hasattr(read, "column_names"):
        column = list(read["source"]) if "source" in read.column_names else []
    else:
        column = [row.get("source") for row in read]
    return [column[pair.row] for pair in pairs] if column else []
