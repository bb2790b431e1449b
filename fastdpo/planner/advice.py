"""Notes for the reader of a plan: what it assumes, and what would make it fit."""

from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import HOST_GB_PER_S, SIZES_GIB
from fastdpo.planner.memory_layout import MemoryLayout
from fastdpo.planner.plan import Plan
from fastdpo.planner.speed import MicroBatchTimes
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


def note_on_base(
    layout: MemoryLayout,
    times: MicroBatchTimes,
    plan: Plan,
    *,
    requested: str,
    gain: float | None,
) -> str:
    """One sentence on where the base lies, why, and whether its copies hide behind the computation.

    Args:
        layout: of the plan.
        times: of a micro-batch of the plan.
        plan: as chosen.
        requested: `--base_weights`, host or auto.
        gain: how much faster the plan is than the best one with the base on the GPU; None where
            none with it there fits.
    """
    if not plan.base_buffers:
        return (
            "The base lies on the GPU, where it fits; from host memory it would be hardly faster."
        )
    blocks = layout.base_on_host
    if requested == "host":
        reason = "as requested"
    elif gain is None:
        reason = "since the pairs do not fit beside it on the GPU"
    else:
        reason = f"which by estimate is {gain - 1:.0%} faster, since more is kept for the backward"
    kept = f"{plan.base_buffers} of its {blocks.count} blocks at a time on the GPU"
    hidden = "hide behind" if times.copies_hide else "do not hide behind"
    return (
        f"The base lies in host memory ({binary_size(blocks.bytes)} pinned, {kept}), {reason}. "
        f"Its copies take {2 * times.copied:.2g} s a micro-batch at {HOST_GB_PER_S:g} GB/s "
        f"(assumed) and {hidden} {times.forward + times.backward:.2g} s of computation."
    )


def _missing(plan: Plan, architecture: Architecture, training: Training) -> str:
    name = max(plan.terms, key=lambda term: plan.terms[term])
    remedies = ["shorter pairs (--max_length)"]
    if training.tuning != "qlora":
        remedies.insert(0, "4-bit weights (--qlora)")
    if training.trains_adapter and not plan.base_buffers:
        remedies.insert(0, "the base in host memory (--base_weights host)")
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
