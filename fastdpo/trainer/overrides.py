"""Methods of transformers' and TRL's trainers that this one never calls.

A subclass that overrides one of them would train as if it had not, without a word.
"""

from typing import Any

from transformers import Trainer

_LOSS = (
    "the loss of an update is taken over packed pairs, not inside one forward: pass loss_function, "
    "a function of the pairs' log-probs (fastdpo.losses.PairLogps), or change the gradient in "
    "training_step"
)
_LOGPS = "log-probs come from the fused head, and no batch of logits exists: pass loss_function"
_DATA = (
    "rows become token ids in fastdpo.data: give train_dataset the rows as they should be, or a "
    "fastdpo.data.PairDataset made by prepare_pairs"
)
_SAMPLING = (
    "the order is a function of seed and epoch: use train_sampling_strategy sequential and order "
    "the rows yourself, or override get_train_dataloader"
)
_LOADING = "override get_train_dataloader or get_eval_dataloader"
_PADDING = "pairs are packed without padding, so there is nothing to collate or to move"
_EVALUATION = (
    "evaluation adds up log-probs of whole sets: override evaluation_loop or evaluate, or add a "
    "callback with on_evaluate"
)
_REFERENCE = (
    "the reference is a model of its own or the policy with its adapter off, and its log-probs are "
    "stored: pass ref_model, or use the options reference and ref_cache"
)
_METRICS = "override log, or add a callback with on_log"
_PRECISION = "the backbone and the head are run on their own: override autocast"
_GENERATION = "nothing is generated in training: do so in a callback, or after it with evaluate"
_WHOLE_SEQUENCES = "no sequence is split over GPUs, and model.forward is never called"

NEVER_CALLED: dict[str, str] = {
    # transformers.Trainer
    **dict.fromkeys(("compute_loss", "compute_loss_context_manager"), _LOSS),
    "autocast_smart_context_manager": _PRECISION,
    **dict.fromkeys(("prediction_step", "prediction_loop"), _EVALUATION),
    **dict.fromkeys(("_get_train_sampler", "_get_eval_sampler"), _SAMPLING),
    "_get_dataloader": _LOADING,
    **dict.fromkeys(
        (
            "_set_signature_columns_if_needed",
            "_remove_unused_columns",
            "_get_collator_with_removed_columns",
        ),
        _DATA,
    ),
    **dict.fromkeys(("_prepare_input", "_prepare_inputs"), _PADDING),
    "_prepare_context_parallel_inputs": _WHOLE_SEQUENCES,
    "create_optimizer_and_scheduler": "override create_optimizer and create_scheduler",
    # trl.DPOTrainer, 1.16 and before
    **dict.fromkeys(
        (
            "_compute_loss",
            "_compute_loss_liger",
            "dpo_loss",
            "get_batch_loss_metrics",
            "compute_liger_loss",
        ),
        _LOSS,
    ),
    **dict.fromkeys(
        (
            "concatenated_forward",
            "concatenated_inputs",
            "get_batch_logps",
            "_get_batch_logps",
            "_get_per_token_logps",
            "get_sequence_logps",
        ),
        _LOGPS,
    ),
    **dict.fromkeys(
        (
            "_prepare_dataset",
            "_tokenize",
            "tokenize_row",
            "process_row",
            "tokenize_batch_element",
            "build_tokenized_answer",
            "_truncate",
        ),
        _DATA,
    ),
    **dict.fromkeys(("collate_fn", "torch_call"), _PADDING),
    **dict.fromkeys(
        (
            "_prepare_model_for_training",
            "_prepare_peft_model",
            "_create_model_from_path",
            "_prepare_deepspeed",
            "_prepare_gradient_checkpointing",
        ),
        "prepare the model before it is given to DPOTrainer",
    ),
    **dict.fromkeys(
        (
            "compute_ref_log_probs",
            "compute_reference_log_probs",
            "_precompute_ref_logps",
            "null_ref_context",
        ),
        _REFERENCE,
    ),
    **dict.fromkeys(("store_metrics",), _METRICS),
    **dict.fromkeys(("generate_from_model_and_ref", "generate_samples"), _GENERATION),
}
"""Name of a method -> what to do in place of overriding it."""


def refuse_overrides(trainer: Trainer) -> None:
    """Raise TypeError where a trainer has a method of its own that would never be called.

    Args:
        trainer: of a subclass of DPOTrainer, or one on which, or on whose class, the method was
            set from outside.
    """
    owners: list[Any] = [trainer, *type(trainer).__mro__]
    for owner in owners[: owners.index(Trainer)]:
        for name in vars(owner).keys() & NEVER_CALLED.keys():
            where = getattr(owner, "__name__", "the trainer")
            raise TypeError(
                f"{where} has its own {name}, which fastdpo never calls: {NEVER_CALLED[name]}."
            )


def has_own(trainer: Any, name: str, base: type) -> bool:
    """True if a subclass of `base`, or the object itself, has a method of its own by that name."""
    return name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name)
