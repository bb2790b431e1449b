"""`python -m fastdpo.plan`: what a run takes of a GPU, before anything is downloaded."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastdpo.cli.exit_codes import EXIT_DOES_NOT_FIT
from fastdpo.cli.parser import command, parse
from fastdpo.options import ModelOptions, resolve_model
from fastdpo.options.checks import Options, check_choice, number, option, whole
from fastdpo.options.passes import ATTENTION_BACKENDS, BASE_WEIGHTS, KERNELS
from fastdpo.system.console import print_line, table

if TYPE_CHECKING:
    from fastdpo.planner import Architecture, GPUSpec, Plan, Training


@dataclass
class PlanningOptions(Options):
    """The options that say for which GPU and which pairs a run is planned."""

    _argument_group_name = "Plan"

    gpu: str = option(
        "auto",
        "The GPU: a size such as 24GiB, a name such as rtx-4090, or auto for what is free on "
        "this machine's.",
    )
    host_memory_gib: float | None = option(
        None,
        "Most pinned host memory, GiB; unset: a share of what is free on this machine.",
        check=number("0 pins nothing.", at_least=0),
    )
    max_length: int = option(
        1024,
        "Most tokens of prompt + completion, as in training; the longest pair is taken to be two "
        "such sequences that share nothing.",
        check=whole(8, "1024 is usual"),
    )
    pairs_per_update: int = option(
        32,
        "Pairs of an update; the average one is taken to be half as long as the longest.",
        check=whole(1, "32 is usual"),
    )
    micro_batch_tokens: int | None = option(
        None,
        "Most tokens of a micro-batch, at least 128. Unset: chosen.",
        check=whole(128, "leave it out to choose"),
    )
    optim: str = option(
        "auto",
        "Optimizer; auto is adamw_torch_fused, or adamw_8bit where nothing else fits.",
    )
    attention: str = option(
        "auto",
        "What attends, as in training; auto is what training would choose on that GPU.",
        choices=list(ATTENTION_BACKENDS),
    )
    kernels: str = option(
        "auto",
        "What computes the layers, as in training; auto is what training would choose on that GPU.",
        choices=list(KERNELS),
    )
    base_weights: str = option(
        "gpu",
        "Where the frozen base lies, as in training: gpu, host, or auto.",
        choices=list(BASE_WEIGHTS),
    )
    longest_pairs: bool = option(
        True, "Show the longest pair that fits each size of GPU; off spares two seconds."
    )
    json: bool = option(False, "Print the plan as JSON and nothing else.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gpu.strip():
            raise ValueError("--gpu is empty; it must be auto, a size such as 24GiB, or a name.")


def main(argv: Sequence[str]) -> None:
    """Parse, plan, print the terms, the choice and the longest pairs.

    Raises:
        SystemExit: 3 where the pairs do not fit, after saying what would make them fit.
        ValueError: the model or the GPU is unknown.
    """
    parsed = parse(
        "plan",
        [ModelOptions, PlanningOptions],
        argv,
        training=False,
        description="Predict the memory of a training run from the model's config alone.",
    )
    model, options = parsed.model, parsed.group(PlanningOptions)
    from fastdpo.planner import Workload, architecture_named, make_plan

    if model.model_name_or_path is None:
        raise ValueError("--model is missing: pass an alias, a folder or a hub id.")
    gpu = _gpu_of(options.gpu)
    architecture = architecture_named(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    training, host_bytes = _training(model, options, gpu), _host_bytes(options)
    longest = 2 * options.max_length
    planned = make_plan(
        architecture,
        training,
        gpu,
        Workload(longest, longest * options.pairs_per_update // 2),
        host_bytes=host_bytes,
        micro_batch_tokens=options.micro_batch_tokens,
        change_optimizer=options.optim == "auto",
        base_weights=options.base_weights,
    )
    if options.json:
        sys.stdout.write(json.dumps(planned.as_json(), indent=2) + "\n")
    else:
        _print(planned, architecture, training, gpu, options)
        if options.longest_pairs:
            print_line(f"\n{longest_pairs(architecture, model, host_bytes, options)}")
            if training.trains_adapter:
                print_line(f"\n{longest_pairs_by_base(architecture, model, host_bytes, options)}")
    if not planned.fits:
        raise SystemExit(EXIT_DOES_NOT_FIT)


def _gpu_of(text: str) -> "GPUSpec":
    from fastdpo.planner import current_gpu, gpu_spec

    return current_gpu() if text.strip().lower() == "auto" else gpu_spec(text)


def _host_bytes(options: PlanningOptions) -> int:
    from fastdpo.planner import pinnable_host_bytes

    if options.host_memory_gib is None:
        return pinnable_host_bytes()
    return int(options.host_memory_gib * 2**30)


def _training(model: ModelOptions, options: PlanningOptions, gpu: "GPUSpec") -> "Training":
    """Return the training that `python -m fastdpo.train` would run; without a flag, LoRA."""
    from fastdpo.planner import Training
    from fastdpo.system.device import BF16_CAPABILITY

    if options.optim != "auto":
        from transformers.training_args import OptimizerNames

        check_choice("optim", options.optim, ["auto", *(known.value for known in OptimizerNames)])
    names = model.lora_target_modules
    without_bf16 = model.dtype == "auto" and gpu.capability < BF16_CAPABILITY
    exact = model.dtype == "float32" or without_bf16
    return Training(
        tuning="qlora" if model.qlora else "full" if model.full else "lora",
        entry_bytes=4 if exact and not model.full else 2,
        lora_r=model.lora_r,
        target_modules=None if names is None else tuple(names),
        optimizer="adamw_torch_fused" if options.optim == "auto" else options.optim,
        attention=options.attention,
        kernels=options.kernels,
    )


def _print(
    planned: "Plan",
    architecture: "Architecture",
    training: "Training",
    gpu: "GPUSpec",
    options: PlanningOptions,
) -> None:
    from fastdpo.planner.gpus import efficiency_of
    from fastdpo.planner.terms import binary_size

    _, sentence = resolve_model(architecture.name)
    if sentence:
        print_line(sentence)
    kind = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}[training.tuning]
    rank = f" r={training.lora_r}" if training.trains_adapter else ""
    print_line(
        f"{architecture.name}: {_count(architecture.parameters)} parameters, {kind}{rank}, "
        f"pairs up to 2 x {options.max_length:,} tokens; GPU: {gpu.name}.\n"
    )
    rows = [[name, binary_size(size)] for name, size in planned.terms.items() if size]
    print_line(table(["peak, by term", "bytes"], [*rows, ["all", binary_size(planned.peak_bytes)]]))
    print_line()
    phases = sorted(planned.phases.items(), key=lambda phase: -phase[1])
    print_line(table(["phase", "allocated"], [[name, binary_size(size)] for name, size in phases]))
    print_line(f"\n{planned.describe()}")
    if planned.tokens_per_second is not None:
        rate = float(f"{planned.tokens_per_second:.2g}")
        print_line(
            f"Speed: about {rate:,.0f} tokens/s, an estimate: the products that must be done at "
            f"{100 * efficiency_of(gpu):.0f} percent of {gpu.tflops:g} TFLOP/s (data sheet), and "
            "dequantization at the GPU's memory bandwidth. A token of a prompt counts once."
        )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e7 else f"{parameters:,}"


def longest_pairs(
    architecture: "Architecture",
    model: ModelOptions,
    host_bytes: int,
    options: PlanningOptions,
) -> str:
    """Tabulate the longest pair 2 x L that fits each size of GPU."""
    from fastdpo.planner import gpu_spec
    from fastdpo.planner.gpus import SIZES_GIB
    from fastdpo.planner.terms import binary_size

    rows = []
    for size in SIZES_GIB:
        gpu = gpu_spec(str(size))
        training = _training(model, options, gpu)
        best = _longest(architecture, training, gpu, host_bytes, options, options.base_weights)
        if best is None:
            rows.append([f"{size} GB", "does not fit", "", "", ""])
            continue
        strategy = [f"{count} {what}" for what, count in best.activation_counts.items()]
        strategy += [f"base from host, {best.base_buffers} buffers"] if best.base_buffers else []
        strategy += ["embeddings on host"] if best.embeddings_on_host else []
        strategy += ["dequantized once"] if best.dequantize_once else []
        strategy += ["tiled norms"] if best.norm_tile_tokens is not None else []
        strategy += ["tiled MLPs"] if best.mlp_tile_tokens is not None else []
        strategy += [best.optimizer] if best.optimizer != training.optimizer else []
        rows.append(
            [
                f"{size} GB",
                f"2 x {best.micro_batch_tokens // 2:,}",
                binary_size(best.peak_bytes),
                binary_size(best.pinned_host_bytes),
                ", ".join(strategy),
            ]
        )
    limit = f"at most {binary_size(host_bytes)} of pinned host memory"
    header = ["GPU", "longest pair", "GPU used", "pinned host", "with"]
    title = f"The longest pair that fits, its two sequences sharing nothing; {limit}:"
    return f"{title}\n{table(header, rows)}"


BASES = {
    "16 bits on GPU": ("lora", "gpu"),
    "NF4 on GPU": ("qlora", "gpu"),
    "16 bits from host": ("lora", "host"),
    "NF4 from host": ("qlora", "host"),
}
"""The ways to hold a frozen base: its precision, and where it lies."""


def longest_pairs_by_base(
    architecture: "Architecture", model: ModelOptions, host_bytes: int, options: PlanningOptions
) -> str:
    """Tabulate the longest pair 2 x L that fits each size of GPU, by the way to hold the base."""
    from fastdpo.planner import gpu_spec
    from fastdpo.planner.gpus import SIZES_GIB
    from fastdpo.planner.terms import GIB

    rows = []
    for size in SIZES_GIB:
        row, gpu = [f"{size} GB"], gpu_spec(str(size))
        for tuning, base_weights in BASES.values():
            training = replace(_training(model, options, gpu), tuning=tuning)
            best = _longest(architecture, training, gpu, host_bytes, options, base_weights)
            row.append(
                "-"
                if best is None
                else f"2 x {best.micro_batch_tokens // 2:,}, {best.pinned_host_bytes / GIB:.1f} GiB"
            )
        rows.append(row)
    title = (
        "By the way to hold the base (--lora or --qlora, --base_weights gpu or host), with the "
        "pinned host memory that it takes; - does not fit:"
    )
    return f"{title}\n{table(['GPU', *BASES], rows)}"


def _longest(
    architecture: "Architecture",
    training: "Training",
    gpu: "GPUSpec",
    host_bytes: int,
    options: PlanningOptions,
    base_weights: str,
) -> "Plan | None":
    """The longest pair; with an 8-bit optimizer where it is shorter than the user's pairs else."""
    from fastdpo.planner import longest_pair

    def found(change_optimizer: bool) -> "Plan | None":
        return longest_pair(
            architecture, training, gpu, host_bytes=host_bytes,
            change_optimizer=change_optimizer, base_weights=base_weights,
        )  # fmt: skip

    best = found(False)
    too_short = best is None or best.micro_batch_tokens < 2 * options.max_length
    return found(True) if too_short and options.optim == "auto" else best


if __name__ == "__main__":
    sys.exit(command(main))
