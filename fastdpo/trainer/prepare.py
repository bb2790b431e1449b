"""Prepares what a trainer is given: its arguments, the policy, its reference, its data sets."""

import copy
import logging
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fastdpo.batching import PairGroups
from fastdpo.config import DPOConfig
from fastdpo.data import PairDataset, cached_pairs, rows_from
from fastdpo.modeling.adapter_starts import check_policy_start
from fastdpo.modeling.adapters import (
    add_adapter,
    base_model_name,
    check_base_frozen,
    is_adapter,
    load_adapter,
    replace_lora_forward,
)
from fastdpo.modeling.base_names import require_base
from fastdpo.modeling.dropout import disable_dropout
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import ModelError, load_model, resolve_dtype
from fastdpo.modeling.multimodal import freeze_other_towers
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.reference_model import (
    FROZEN_ADAPTER,
    ReferenceModel,
    reference_from_adapter,
    reference_from_base,
    reference_from_copy,
    reference_from_held,
    reference_from_model,
    reference_from_start,
)
from fastdpo.modeling.trainable import (
    check_adapters,
    check_quantization,
    check_quantization_config,
)
from fastdpo.options import reference_folder
from fastdpo.options.passes import check_base_weights
from fastdpo.ref_cache import RefLogpsProvider, StoreOptions
from fastdpo.system import ranks

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


def one_update_per_step(args: DPOConfig, trains_adapter: bool) -> DPOConfig:
    """A copy of the arguments for transformers' Trainer, each of whose steps is a whole update.

    It must neither accumulate gradients nor checkpoint activations a second time. Adapters train
    without autocast: the frozen base has its dtype, the adapters theirs (fp32). Where several ranks
    share an update, each one's Trainer takes the whole update as that of one process: it must
    neither split batches nor average losses.
    """
    args = copy.copy(args)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    # ExecutionLayout.activation_plan decides it layer by layer.
    args.activation_checkpointing = args.gradient_checkpointing = False
    if trains_adapter:
        args.bf16 = args.fp16 = False
        args.mixed_precision = "no"  # what transformers 5.23 reads, settled in __post_init__
    if ranks.count() > 1:
        args.log_level_replica = "error"
        args.log_on_each_node = args.save_on_each_node = False
        args.distributed_state = SimpleNamespace(  # pyrefly: ignore
            num_processes=1,
            process_index=ranks.index(),
            local_process_index=args.local_process_index,
            distributed_type=DistributedType.NO,
            device=args.device,
        )
    return args


def share_model(accelerator: Accelerator, policy: Model) -> None:
    """Keep accelerate from wrapping a policy whose gradients the ranks sum up themselves.

    It does not wrap a model that it has prepared for evaluation, nor prepare one twice.
    """
    if ranks.count() > 1:
        accelerator.prepare_model(policy, evaluation_mode=True)
        policy._is_accelerate_prepared = True  # pyrefly: ignore


def prepare_policy(
    model: str | os.PathLike[str] | Model,
    args: DPOConfig,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> Model:
    """Load or take over the model that is trained, and add an adapter where one is wanted.

    Args:
        model: a loaded model, its folder or hub id, or the folder of an adapter to train further.
        args: how to load the model, its dropout, and the seed of a new adapter.
        peft_config: configures a new adapter; None adds none.
        quantization_config: how to quantize a model that is given by name.

    Raises:
        ModelError: the model cannot be loaded.
        ValueError: loading options come with a loaded model, its weights or adapters are of a kind
            that is not built, it would have two adapters, the base below one is trained, or the
            adapter has taken a part of it.
    """
    by_name = isinstance(model, str | os.PathLike)
    trains_adapter = peft_config is not None or (
        is_adapter(str(model)) if by_name else isinstance(model, PeftModel)
    )
    check_base_weights(args.base_weights, trains_adapter=trains_adapter)
    loading = args.from_pretrained_options
    if quantization_config is not None:
        loading["quantization_config"] = quantization_config
    check_quantization_config(loading.get("quantization_config"))
    if by_name:
        model = load_policy(
            str(model),
            dtype=resolve_dtype("auto"),
            base_weights=args.base_weights if trains_adapter else "gpu",
            trust_remote_code=args.trust_remote_code,
            options=loading,
        )
    elif loading:
        raise ValueError(
            f"{' and '.join(loading)} are for a model given by name; this one is loaded already. "
            "Pass them to from_pretrained."
        )
    check_quantization(model)
    check_adapters(model)
    if args.disable_dropout:
        disable_dropout(model)
    if peft_config is None:
        replace_lora_forward(model)
        freeze_other_towers(model)
    else:
        set_seed(args.seed)  # the adapter's first weights belong to the run's seed
        model = add_adapter(model, peft_config)
    check_base_frozen(model)
    check_policy_start(model)
    ranks.sent_by_first([each for each in model.parameters() if each.requires_grad])
    return model


def load_policy(name: str, **arguments: Any) -> Model:
    """Load a model by folder or hub id; an adapter's folder gives its base with it, trainable.

    Takes the arguments of `load_model`.
    """
    if not is_adapter(name):
        return load_model(name, **arguments)
    base = base_model_name(name)
    require_base(base, name)
    try:
        loaded = load_model(base, **arguments)
    except ModelError as error:
        raise ModelError(f"{error} The adapter in {name} names it as its base.") from error
    return load_adapter(loaded, name, trainable=True)


def prepare_reference(
    policy: Model, ref_model: str | os.PathLike[str] | Model | None, args: DPOConfig
) -> ReferenceModel:
    """Choose the reference that the policy is compared with, and log the choice.

    Args:
        policy: the model from `prepare_policy`.
        ref_model: a model, its folder or hub id, an adapter's folder, or None for `--reference`.
        args: has `reference` and `sync_ref_model`.

    Raises:
        ModelError: the reference cannot be loaded.
        ValueError: the reference cannot be compared with the policy.
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
    elif isinstance(policy, PeftModel) and (name := _held_adapter(policy, requested)):
        reference = reference_from_held(policy, name)
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
        check_quantization(requested)
        reference = reference_from_model(requested, policy)
    logger.info("%s", reference.description)
    return reference


def reference_provider(
    policy: Model,
    reference: ReferenceModel,
    args: DPOConfig,
    layout: ExecutionLayout,
    mode: PackingMode,
    *,
    precision: str,
    needed: bool,
) -> RefLogpsProvider:
    """Set up where a run's reference log-probs come from.

    Args:
        policy: the model that is trained.
        reference: the reference of the run.
        args: has the store's folder and options, and the loss.
        layout: bounds the micro-batches of the reference pass.
        mode: how pairs run through the model.
        precision: accelerate's mixed precision: bf16, fp16, or another name for none.
        needed: whether the loss looks at reference log-probs.

    Raises:
        ValueError: nothing would keep the log-probs of a reference that training changes.
    """
    folder = None if args.sync_ref_model else reference_folder(args.ref_cache)
    if folder is None and not reference.is_frozen and needed:
        raise ValueError(
            "--ref_cache is off and all weights are trained: the reference is gone after the "
            "first update. Leave --ref_cache out, or train an adapter (--lora, --qlora)."
        )
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return RefLogpsProvider(
        reference,
        folder,
        compute_dtype=mixed.get(precision, unwrap_model(policy).dtype),
        layout=layout,
        mode=mode,
        loss=args,
        store_options=StoreOptions.of_run(args),
    )


def tokenize_dataset(
    dataset: Any,
    name: str,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    *,
    limit: int | None = None,
) -> PairGroups | None:
    """Tokenize the rows of a data set into groups.

    Args:
        dataset: rows as TRL takes them, or a `PairDataset`. Groups and None are returned as they
            are.
        name: name of the set in messages.
        args: how rows become token ids.
        tokenizer: the policy's tokenizer.
        vocabulary_size: number of tokens that the policy's head scores.
        limit: most pairs to take from a stream; None takes all.

    Raises:
        DataError: rows cannot be used; the message says where they are.
    """
    if dataset is None or isinstance(dataset, PairGroups):
        return dataset
    if not isinstance(dataset, PairDataset):
        rows = rows_from(dataset, f"{name} dataset")
        dataset = cached_pairs(
            rows,
            tokenizer,
            args,
            limit=limit if rows.is_stream else None,
            vocabulary_size=vocabulary_size,
            progress=not args.disable_tqdm,
        )
        level = logging.WARNING if dataset.report.loses_much else logging.INFO
        logger.log(level, "%s", dataset.report.describe())
    return PairGroups(dataset)


def _held_adapter(policy: PeftModel, requested: Any) -> str | None:
    """The adapter inside the policy that is meant as its reference, if there is one.

    By name; unasked, one that is called reference, as in TRL's recipe of two adapters.
    """
    if requested in ("adapter", "base"):
        return None
    name = FROZEN_ADAPTER if requested is None else requested
    held = isinstance(name, str) and name in policy.peft_config
    return name if held and name not in policy.active_adapters else None


def _named_reference(policy: Model, name: str, args: DPOConfig) -> ReferenceModel:
    if is_adapter(name) and isinstance(policy, PeftModel):
        return reference_from_adapter(policy, name)
    loading = args.from_pretrained_options
    return reference_from_model(
        load_policy(
            name,
            dtype=resolve_dtype("auto"),
            base_weights=args.base_weights,
            trust_remote_code=args.trust_remote_code,
            options=loading,
        ),
        policy,
    )
