"""Layers: what one launches, counted; and the step of a stack of them, packed and padded.

Operations: launches and bytes of one layer with transformers' modules and with the fused ops, by
`bench.layer_operations`. Nothing of it is a measurement.

Step: one training step of a Llama-3.1-8B-shaped stack: packed and shared, packed, padded as TRL
pads.

Forward and backward of all weights, a few layers of the real width under a small head. How much
faster packing can be is arithmetic: the products that padding and repeated prompts cost more. It is
printed beside what was measured; `of_bound_relative` is the part of it that was reached.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.contest import Turns, contest
from bench.harness import MEASURED, SEED, Recorder, spread
from bench.layer_operations import PHASES, count_operations, summary
from bench.measuring import PeakMemory, Stopwatch
from bench.synthetic import aliased_config
from fastdpo.batching import MicroBatch, PromptGroup, pack_update
from fastdpo.modeling.attention import MODEL_ATTENTION, packed_attention
from fastdpo.modeling.logprobs import packed_logprobs

STACKS = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 4096},
    "cpu": {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4,
            "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 256},
}  # fmt: skip
"""Width, heads and their ratio of Llama-3.1-8B; for the CPU the same at a 64th of the width."""

SHARES = (0.2, 0.5, 0.8)
PADDED = "padded as TRL"
CONTENDERS: dict[str, dict[str, Any]] = {
    PADDED: {"attention": MODEL_ATTENTION, "layout": {"packing": False}},
    "fastdpo": {"attention": "auto", "layout": {}},
    "fastdpo unshared": {"attention": "auto", "layout": {"shared_prefix": False}},
}
COUNTED = {"alias": ("llama-3.1-8b", "qwen3-8b"), "tokens": 8192}
"""Models of which one layer's operations are counted, and T."""

ATTENTION_PASSES = 3.5
"""Forward one, backward two and a half: it forms the scores again."""


def groups_of(case: Mapping[str, Any]) -> list[PromptGroup]:
    """Pairs whose rows are around `seq_lens` long, of which the prompt is `prompt_share`."""
    draw = np.random.default_rng(SEED)
    vocabulary = STACKS[case["device"]]["vocab_size"]
    groups = []
    for _ in range(case["pairs"]):
        length = case["row_tokens"] * draw.uniform(0.5, 1.5)
        prompt = max(1, round(length * case["prompt_share"]))
        answers = (length - prompt) * draw.uniform(0.75, 1.25, 2)
        parts = [draw.integers(0, vocabulary, max(2, round(n)), dtype=np.int32) for n in answers]
        groups.append(
            PromptGroup(draw.integers(0, vocabulary, prompt, dtype=np.int32), (parts[0], parts[1]))
        )
    return groups


def micro_batches_of(case: Mapping[str, Any], layout: Mapping[str, Any]) -> list[MicroBatch]:
    """The pairs as a contender lays them; TRL pads `padded_pairs` of them at a time, unsorted."""
    groups = groups_of(case)
    if layout.get("packing", True):
        return pack_update(groups, case["micro_batch_tokens"], **layout)
    size = case["padded_pairs"]
    lots = [groups[i : i + size] for i in range(0, len(groups), size)]
    return [micro_batch for lot in lots for micro_batch in pack_update(lot, 10**9, packing=False)]


def seen_keys(micro_batch: MicroBatch) -> int:
    """(query, key) pairs that causal attention forms, summed over the rows."""
    if not micro_batch.segments:
        rows, length = micro_batch.input_ids.shape
        return rows * length * (length + 1) // 2
    total = 0
    for segment in micro_batch.segments:
        prefix = segment.prefix_tokens
        total += prefix * (prefix + 1) // 2
        total += sum(n * prefix + n * (n + 1) // 2 for n in segment.suffix_tokens)
    return total


def step_flops(case: Mapping[str, Any], layout: Mapping[str, Any]) -> float:
    """FLOPs of forward and backward of the stack, its head aside."""
    stack = STACKS[case["device"]]
    hidden, heads = stack["hidden_size"], stack["num_attention_heads"]
    kv_size = hidden // heads * stack["num_key_value_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * stack["intermediate_size"]
    micro_batches = micro_batches_of(case, layout)
    tokens = sum(micro_batch.input_ids.numel() for micro_batch in micro_batches)
    keys = sum(map(seen_keys, micro_batches))
    layer = 6 * weights * tokens + ATTENTION_PASSES * 4 * hidden * keys
    return stack["num_hidden_layers"] * layer


def stack_of(case: Mapping[str, Any]) -> PreTrainedModel:
    """The layers, all of them trained."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**STACKS[case["device"]], max_position_embeddings=131072)
    with torch.device(case["device"]):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case["dtype"])).train()


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """One contender; each turn is one step."""
    device = torch.device(case["device"])
    model, chosen = stack_of(case), CONTENDERS[case["contender"]]
    micro_batches = [m.to(device) for m in micro_batches_of(case, chosen["layout"])]

    def step() -> None:
        model.zero_grad(set_to_none=False)
        with packed_attention(model.config, chosen["attention"]):
            for micro_batch in micro_batches:
                packed_logprobs(model, micro_batch).logps.sum().backward()

    step()
    memory = PeakMemory(device)
    memory.start()
    step()
    turns.ready(memory.over_start())
    watch = Stopwatch(device)
    for _ in turns:
        turns.answer(watch.measure(step))


def cases(*, quick: bool) -> Iterator[dict[str, Any]]:
    """A case for every share of the prompt."""
    if torch.cuda.is_available():
        size = {"device": "cuda", "dtype": "bfloat16", "pairs": 16, "row_tokens": 1024,
                "micro_batch_tokens": 8192, "padded_pairs": 4}  # fmt: skip
    else:
        size = {"device": "cpu", "dtype": "float32", "pairs": 8, "row_tokens": 128,
                "micro_batch_tokens": 1024, "padded_pairs": 4}  # fmt: skip
    for share in SHARES[1:2] if quick else SHARES:
        yield {"prompt_share": share, **size}


def main(recorder: Recorder, *, quick: bool, part: str = "all") -> None:
    """The operations of a layer, the step of a stack, or both."""
    if part in ("operations", "all"):
        count_layers(recorder)
    if part in ("step", "all"):
        step_seconds(recorder, quick=quick)


def count_layers(recorder: Recorder) -> None:
    """Launches of a recomputed layer, its bytes by kind, and what it saves when kept."""
    for alias in COUNTED["alias"]:
        case = {"model": alias, "tokens": COUNTED["tokens"], "lora_r": 16, "weights": "NF4"}
        for kernels in ("eager", "fused"):
            config = aliased_config(alias, num_hidden_layers=1)
            operations, kept = count_operations(config, case["tokens"], kernels)
            counts = summary(operations)
            phases = ", ".join(f"{counts['launches'][phase]} {phase}" for phase in PHASES)
            launches = sum(each.launches for each in operations)
            recorder.add(case, kernels, "launches_count", [launches], note=phases)
            for kind, moved in counts["bytes"].items():
                recorder.add(case, kernels, f"{kind}_bytes", [moved])
            recorder.add(case, kernels, "saved_when_kept_bytes", [kept])


def step_seconds(recorder: Recorder, *, quick: bool) -> None:
    """Seconds of a step, the speed-up over padding, and the part of its bound that it is."""
    for case in cases(quick=quick):
        given = {name: {**case, "contender": name} for name in CONTENDERS}
        functions = dict.fromkeys(CONTENDERS, "bench.layers:contend")
        alone = case["device"] == "cuda"
        rounds = 3 if quick else 9
        padded_s = None
        for name, result in contest(functions, given, warm_up=2, rounds=rounds, alone=alone):
            if result.outcome != MEASURED:
                recorder.add(case, name, "step_s", outcome=result.outcome, note=result.note)
                continue
            step_s = result.column("wall_s")
            recorder.add(case, name, "step_s", step_s)
            recorder.add(case, name, "peak_mib", [result.facts["peak_mib"]])
            if name == PADDED:
                padded_s = spread(step_s)[1]
            elif padded_s is not None:
                layouts = [CONTENDERS[each]["layout"] for each in (PADDED, name)]
                theirs, ours = (step_flops(case, layout) for layout in layouts)
                bound, reached = theirs / ours, padded_s / spread(step_s)[1]
                note = f"{reached:.2f} times as fast where arithmetic allows {bound:.2f}"
                recorder.add(case, name, "of_bound_relative", [reached / bound], note=note)


if __name__ == "__main__":
    from bench.command import run

    run("layers", parts=("operations", "step"))
