"""What a trainer is given, made ready: the policy, its reference, the pairs of its data sets."""

import logging
import os
from dataclasses import fields, replace
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fastdpo.batching import PairGroups
from fastdpo.config import DPOConfig
from fastdpo.data import PairDataset, prepare_pairs, rows_from
from fastdpo.modeling.adapters import (
    add_adapter,
    base_model_name,
    check_base_frozen,
    is_adapter,
    load_adapter,
    replace_lora_forward,
)
from fastdpo.modeling.loading import disable_dropout, resolve_dtype
from fastdpo.modeling.reference_model import (
    ReferenceModel,
    reference_from_adapter,
    reference_from_base,
    reference_from_copy,
    reference_from_model,
    reference_from_start,
)
from fastdpo.options import TokenizationOptions
from fastdpo.ref_cache import load_identified

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


def prepare_policy(
    model: str | os.PathLike[str] | Model,
    args: DPOConfig,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> Model:
    """The model that is trained, with its adapter if it gets or has one.

    Args:
        model: loaded, or its folder or hub id; of an adapter's folder the adapter is trained on.
        args: for the loading, the dropout and the seed of a new adapter.
        peft_config: of a new adapter.
        quantization_config: for a model given by name.

    Raises:
        ModelError: the model cannot be had.
        ValueError: options for loading a model that is loaded, two adapters, a trained base.
    """
    by_name = isinstance(model, str | os.PathLike)
    loading = args.from_pretrained_options
    if quantization_config is not None:
        loading["quantization_config"] = quantization_config
    if by_name:
        model = load_policy(
            str(model),
            dtype=resolve_dtype("auto"),
            trust_remote_code=args.trust_remote_code,
            options=loading,
        )
    elif loading:
        raise ValueError(
            f"{' and '.join(loading)} are for a model given by name; this one is loaded already. "
            "Pass them to from_pretrained."
        )
    if args.disable_dropout:
        disable_dropout(model)
    if peft_config is None:
        replace_lora_forward(model)
    else:
        set_seed(args.seed)  # the adapter's first weights belong to the run's seed
        model = add_adapter(model, peft_config)
    check_base_frozen(model)
    return model


def load_policy(name: str, **arguments: Any) -> Model:
    """A model by folder or hub id; the adapter of a folder on its base, to be trained on.

    Takes the arguments of `load_model`.
    """
    if not is_adapter(name):
        return load_identified(name, **arguments)
    return load_adapter(load_identified(base_model_name(name), **arguments), name, trainable=True)


def prepare_reference(
    policy: Model, ref_model: str | os.PathLike[str] | Model | None, args: DPOConfig
) -> ReferenceModel:
    """What the policy is compared with, said in the log.

    Args:
        policy: as `prepare_policy` made it.
        ref_model: a model, its folder or hub id, an adapter's folder, or None for `--reference`.
        args: `reference` and `sync_ref_model`.

    Raises:
        ModelError: the reference cannot be had.
        ValueError: it cannot be compared with the policy.
    """
    requested = args.reference if ref_model is None else ref_model
    if args.sync_ref_model:
        if requested is not None:
            raise ValueError(
                "sync_ref_model moves a copy of the policy; another reference does not fit to it: "
                "leave out ref_model and --reference, or sync_ref_model."
            )
        reference = replace(
            reference_from_copy(policy),
            description="The reference is a copy that follows the policy.",
        )
    elif requested in (None, "adapter"):
        reference = reference_from_start(policy)
        if requested == "adapter" and reference.adapter is None:
            raise ValueError(
                "--reference is adapter and training does not start from an adapter: leave it out, "
                "or pass the folder of a trained adapter as the model."
            )
    elif requested == "base":
        reference = reference_from_base(policy)
    elif isinstance(requested, str | os.PathLike):
        reference = _named_reference(policy, str(requested), args)
    else:
        reference = reference_from_model(requested, policy)
    logger.info("%s", reference.description)
    return reference


def tokenize_dataset(
    dataset: Any,
    name: str,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    *,
    limit: int | None = None,
) -> PairGroups | None:
    """Rows to groups; what is prepared already, or None, stays as it is.

    Args:
        dataset: rows as TRL takes them, or a `PairDataset`.
        name: of the set, for messages.
        args: how rows become token ids.
        tokenizer: of the policy.
        vocabulary_size: rows of its head.
        limit: most pairs to take from a stream; None takes all.

    Raises:
        DataError: rows that cannot be used, with their place.
    """
    if dataset is None or isinstance(dataset, PairGroups):
        return dataset
    if not isinstance(dataset, PairDataset):
        rows = rows_from(dataset, f"{name} dataset")
        dataset = prepare_pairs(
            rows,
            tokenizer,
            **{entry.name: getattr(args, entry.name) for entry in fields(TokenizationOptions)},
            limit=limit if rows.is_stream else None,
            vocabulary_size=vocabulary_size,
            progress=not args.disable_tqdm,
        )
        logger.info("%s", dataset.report.describe())
    return PairGroups(dataset)


def _named_reference(policy: Model, name: str, args: DPOConfig) -> ReferenceModel:
    if is_adapter(name) and isinstance(policy, PeftModel):
        return reference_from_adapter(policy, name)
    loading = args.from_pretrained_options
    return reference_from_model(
        load_policy(
            name,
            dtype=resolve_dtype("auto"),
            trust_remote_code=args.trust_remote_code,
            options=loading,
        ),
        policy,
    )
