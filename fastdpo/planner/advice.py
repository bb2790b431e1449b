"""Notes for the reader of a plan: what it assumes, and what would make it fit."""

from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import SIZES_GIB
from fastdpo.planner.plan import Plan
from fastdpo.planner.terms import GIB, Training, binary_size


def notes_on(plan: Plan, architecture: Architecture, training: Training) -> tuple[str, ...]:
    """The notes on a plan, whole sentences, the most important first."""
    notes = []
    if plan.peak_bytes > plan.gpu_bytes:
        notes.append(_missing(plan, architecture, training))
    elif plan.pinned_host_bytes > plan.host_bytes:
        notes.append(
            f"It wants {binary_size(plan.pinned_host_bytes)} of pinned host memory and may have "
            f"{binary_size(plan.host_bytes)}: free host memory, or shorten the pairs "
            "(--max_length)."
        )
    if plan.optimizer != training.optimizer:
        notes.append(f"It needs --optim {plan.optimizer}, whose state is smaller and rounded.")
    if not architecture.is_standard:
        notes.append(
            f"{architecture.model_type} layers are not attention and one gated MLP: what a layer "
            "takes is a guess, and the first update will tell."
        )
    if architecture.states is not None and architecture.states.by == "torch":
        notes.append(
            "Its layers with a state are counted as torch runs them: the kernels of "
            "flash-linear-attention or mamba-ssm are not installed here, and save less."
        )
    if not training.trains_adapter:
        notes.append("Of full fine-tuning what a layer takes is known to about 10 percent.")
    return tuple(notes)


def _missing(plan: Plan, architecture: Architecture, training: Training) -> str:
    name = max(plan.terms, key=lambda term: plan.terms[term])
    remedies = ["shorter pairs (--max_length)"]
    if training.tuning != "qlora":
        remedies.insert(0, "4-bit weights (--qlora)")
    if training.optimizer == plan.optimizer and "8bit" not in training.optimizer:
        remedies.append("an 8-bit optimizer (--optim adamw_8bit)")
    larger = next((size for size in SIZES_GIB if size * GIB >= plan.peak_bytes), None)
    remedies.append(
        f"a GPU of {larger} GiB" if larger else f"a GPU above {SIZES_GIB[-1]} GiB or less model"
    )
    return (
        f"{architecture.name} does not fit: with all savings it needs "
        f"{binary_size(plan.peak_bytes)} of {binary_size(plan.gpu_bytes)}; the largest term is "
        f"{name} with {binary_size(plan.terms[name])}. What helps: {', '.join(remedies)}."
    )
