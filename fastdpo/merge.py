"""`python -m fastdpo.merge`: an adapter into its base, as one plain model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastdpo.cli.outputs import complete_inputs
from fastdpo.cli.parser import command, parse
from fastdpo.options import (
    TRAINING_OPTIONS,
    ComparisonOptions,
    DataOptions,
    ModelOptions,
    TokenizationOptions,
    resolve_model,
)
from fastdpo.options.checks import Options, option, whole
from fastdpo.options.passes import BASE_WEIGHTS
from fastdpo.system.console import print_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fastdpo.batching import PromptGroup
    from fastdpo.merging import Adapter, Base, MergePlan
    from fastdpo.merging.fidelity import Fidelity

ONTO_MODES = ("bf16", "dequantized")
ROUNDINGS = ("stochastic", "nearest")


@dataclass
class MergingOptions(Options):
    """The options that say what an adapter is merged into and how the result is checked."""

    _argument_group_name = "Merging"

    adapter: str | None = option(None, "Folder of the trained adapter.")
    output_dir: str = option("merged", "Folder for the merged model; new, or empty.")
    onto: str = option(
        "bf16",
        "Weights that the adapter is added to: bf16 are those of the base as they are stored; "
        "dequantized sends every weight that --qlora holds in 4 bits there and back first, so "
        "that the adapter meets the weights it was trained on.",
        choices=list(ONTO_MODES),
    )
    rounding: str = option(
        "stochastic",
        "How the sum is rounded to a 16-bit dtype: stochastic, with a seed, where rounding to "
        "nearest would leave most weights of a tensor as they were, since the update is then lost; "
        "or always nearest.",
        choices=list(ROUNDINGS),
    )
    rounding_seed: int = option(0, "Seed of the stochastic rounding.", check=whole(0, "0 is usual"))
    overwrite: bool = option(
        False, "Replace an earlier result of this command in --output_dir; nothing else ever is."
    )
    report_pairs: int = option(
        24,
        "Pairs of --dataset on which margin, accuracy and log-probs before and after are compared; "
        "a few show what moved, and each costs four to nine passes. 0 compares none.",
        check=whole(0, "24 is usual, 0 compares none"),
    )
    base_weights: str = option(
        "gpu",
        "Where matrices lie while pairs are compared: gpu, or host, from whose memory they come "
        "layer by layer; auto: host where they do not fit on the GPU.",
        choices=list(BASE_WEIGHTS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is None:
            raise ValueError(
                "--adapter is missing: pass the folder that training with --lora or --qlora wrote."
            )


def main(argv: Sequence[str]) -> None:
    """Parse, merge, compare margins and log-probs, and say what to do with the result."""
    parsed = parse(
        "merge",
        [ModelOptions, MergingOptions, DataOptions, TokenizationOptions],
        argv,
        training=False,
        description="Merge an adapter into its base, file by file in bounded memory. With "
        "--dataset, say what is kept of the preferences learned and how far log-probs move; with "
        "--qlora, against the 4-bit base. --dtype is that of the result; auto keeps the base's.",
        refused=TRAINING_OPTIONS,
    )
    complete_inputs(parsed)
    run(parsed.model, parsed.group(MergingOptions), parsed.data, parsed.group(TokenizationOptions))


def run(
    model: ModelOptions, options: MergingOptions, data: DataOptions, rows: TokenizationOptions
) -> None:
    """Merge, write the folder and report.

    Raises:
        ValueError: the adapter, its base or the data cannot be loaded or do not fit, a weight is
            not finite, something else lies in the folder, or another process is merging into it.
    """
    from fastdpo.merging import claim_folder, finish_folder, hold_folder, write_folder
    from fastdpo.planner.terms import binary_size

    adapter, base = _read(model, options)
    plan, *others = _plans(base, adapter, model, options)
    folder = Path(options.output_dir)
    groups = _groups(model, options, data, rows, base.name)
    with hold_folder(folder):
        claim_folder(folder, base, adapter, overwrite=options.overwrite)
        merged = write_folder(plan, folder)
        if groups:
            fidelity = _measure(model, options, plan, others, groups)
            print_line(fidelity.describe())
            finish_folder(merged, fidelity.as_json())
        else:
            print_line(
                "Nothing was compared: pass --dataset to see what the merge keeps of the "
                "preferences that were learned."
            )
    print_line(f"\nThe merged model lies in {folder} ({binary_size(merged.bytes)}).")
    if plan.unties:
        print_line("Its embedding and head were one tensor in the base and are two now.")
    print_line(f'transformers: {base.auto_class}.from_pretrained("{folder}", dtype="auto")')
    print_line(f"vLLM:         vllm serve {folder}")
    print_line(f"llama.cpp:    python convert_hf_to_gguf.py {folder}")


def _read(model: ModelOptions, options: MergingOptions) -> tuple["Adapter", "Base"]:
    from fastdpo.merging import find_base, read_adapter
    from fastdpo.modeling.base_names import require_base

    adapter = read_adapter(Path(options.adapter or ""))
    name = model.model_name_or_path or adapter.config.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"the adapter in {adapter.folder} does not name its base: pass it as --model."
        )
    if model.model_name_or_path is None:
        require_base(name, str(adapter.folder))
    name, sentence = resolve_model(name)
    if sentence:
        print_line(sentence)
    base = find_base(name, revision=model.model_revision, trust_remote_code=model.trust_remote_code)
    return adapter, base


def _plans(
    base: "Base", adapter: "Adapter", model: ModelOptions, options: MergingOptions
) -> list["MergePlan"]:
    """Plan the merge that is asked for, and those to compare it with.

    These are the other rounding and, where the adapter's base is in 4 bits, the other base.
    """
    from fastdpo.merging import plan_merge
    from fastdpo.modeling.loading import resolve_dtype

    onto, rounding = options.onto, options.rounding
    ways = [(onto, rounding), *((onto, other) for other in ROUNDINGS if other != rounding)]
    if _in_4bit(model, options):
        ways += [(other, rounding) for other in ONTO_MODES if other != onto]
    return [
        plan_merge(
            base,
            adapter,
            base_precision=base_precision,
            quantized_from=resolve_dtype("auto"),
            dtype=None if model.dtype == "auto" else resolve_dtype(model.dtype),
            rounding=way,
            seed=options.rounding_seed,
        )
        for base_precision, way in ways
    ]


def _groups(
    model: ModelOptions,
    options: MergingOptions,
    data: DataOptions,
    rows: TokenizationOptions,
    base: str,
) -> list["PromptGroup"]:
    """Read the pairs to compare log-probs on; none without a data set."""
    from fastdpo.batching import PairGroups
    from fastdpo.evaluation.load_both import read_pairs, tokenizer_of

    if not options.report_pairs or not (data.eval_dataset or data.dataset_name):
        return []
    compared = ComparisonOptions(adapter=options.adapter)
    tokenizer = tokenizer_of(replace(model, model_name_or_path=base), compared)
    groups = PairGroups(read_pairs(data, rows, tokenizer)[1])
    return [groups[i] for i in range(min(options.report_pairs, len(groups)))]


def _measure(
    model: ModelOptions,
    options: MergingOptions,
    plan: "MergePlan",
    others: Sequence["MergePlan"],
    groups: Sequence["PromptGroup"],
) -> "Fidelity":
    """Score with the adapter on its base, then with each merged model; one in memory at a time."""
    import torch

    from fastdpo.evaluation.load_both import load_policy, load_weights
    from fastdpo.merging.fidelity import compare, put_in_place
    from fastdpo.modeling.adapters import adapters_disabled, load_adapter
    from fastdpo.modeling.scoring import ScoredPairs, score_pairs

    in_4bit, whole_base = _in_4bit(model, options), None
    compared = ComparisonOptions(adapter=options.adapter, base_weights=options.base_weights)
    trained = replace(model, model_name_or_path=plan.base.name, dtype="auto", qlora=in_4bit)

    def score_on(
        policy: "PreTrainedModel | PeftModel", name: str
    ) -> tuple[ScoredPairs, ScoredPairs]:
        """With the adapter, and without."""
        with_it = score_pairs(policy, groups, description=f"Scoring with the adapter on {name}")
        with adapters_disabled(policy):
            return with_it, score_pairs(policy, groups, description=f"Scoring {name}")

    before, reference = score_on(load_policy(trained, compared), "its base")
    if in_4bit:
        unquantized = replace(trained, qlora=False)
        whole = load_weights(unquantized, plan.base.name, options.base_weights)
        whole_base = score_on(load_adapter(whole, str(plan.adapter.folder)), "the whole base")
        del whole
    written = str(plan.main_dtype).removeprefix("torch.")
    # A CPU computes in fp32; there is no GPU that would compute the model in fp64.
    exact = written == "float64" or not torch.cuda.is_available()
    computed = "float32" if exact else written
    result = replace(trained, dtype=computed, qlora=False)
    loaded = load_weights(result, options.output_dir, options.base_weights)
    plans: dict[str, MergePlan] = {}
    after: dict[str, ScoredPairs] = {}
    for each in (plan, *others):
        if each is not plan:
            if each.base_precision == plan.base_precision and not plan.may_swallow:
                continue  # rounded alike
            put_in_place(loaded, each, plan)
        variant = f"{each.base_precision} {each.rounding}"
        plans[variant] = each
        after[variant] = score_pairs(loaded, groups, description=f"Scoring merged, {variant}")
    return compare(
        before,
        reference,
        after,
        whole_base=whole_base,
        plans=plans,
        dtype=written,
        in_4bit=in_4bit,
    )


def _in_4bit(model: ModelOptions, options: MergingOptions) -> bool:
    return model.qlora or options.onto == "dequantized"


if __name__ == "__main__":
    sys.exit(command(main))
