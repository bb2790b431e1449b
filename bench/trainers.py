"""The contenders of an update: whole trainers on the same pairs in the same order.

All are built alike: fp32 on the CPU (bf16 on CUDA), AdamW, the same batch, learning rate and
checkpointing, log lines every 10 updates. An update counts from one step's end to the next: loading
and collating, forward, backward, clipping, optimizer.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from bench.contest import MissingPeer, Turns
from bench.harness import SEED
from bench.measuring import PeakMemory, Stopwatch
from bench.models import model_and_rows

LORA_RANK, LORA_ALPHA = 16, 32


class Gate(TrainerCallback):
    """Lets a trainer make one update a turn, and measures it.

    Args:
        turns: the line to the bench.
        device: what the memory and the time are of.
    """

    def __init__(self, turns: Turns, device: torch.device) -> None:
        self.turns = turns
        self.watch, self.memory = Stopwatch(device), PeakMemory(device)
        self.tokens = 0
        self.gradient_norm = float("nan")
        self.facts: dict[str, Any] = {}

    def count_tokens_of(self, *models: nn.Module) -> None:
        """Count every token that goes through the embeddings, the reference's passes included."""

        def count(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.tokens += arguments[0].numel()

        for model in models:
            model.get_input_embeddings().register_forward_pre_hook(count)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.memory.start()
        self.turns.ready(self.facts)
        self._next(control)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        figures = self.watch.stop() | self.memory.over_start() | {"run_tokens": self.tokens}
        figures["gradient_norm"] = float(self.gradient_norm)
        self.turns.answer(figures)
        self._next(control)

    def _next(self, control: Any) -> None:
        if not self.turns.wait():
            control.should_training_stop = True
        self.tokens = 0
        self.watch.start()


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """One trainer, an update a turn."""
    if limit_gib := case.get("card_gib"):
        limit_memory(torch.device(case["device"]), limit_gib)
    gate = Gate(turns, torch.device(case["device"]))
    with TemporaryDirectory() as folder:
        trainer = build(case, Path(folder), [gate])
        models = [trainer.model, getattr(trainer, "ref_model", None)]
        gate.count_tokens_of(*(model for model in models if model is not None))
        gate.facts = facts_of(trainer) if case["library"] == "fastdpo" else {}
        if "folder" in case and case["library"] == "fastdpo":
            gate.facts["reference_pass"] = gate.watch.measure(trainer.compute_references)
        trainer.train()


def build(case: Mapping[str, Any], folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
    """The trainer of a case.

    Its keys: library, tuning (lora, qlora, full), pairs (B), accumulation, checkpointing, updates,
    rows, model, dtype, device, and what `model_and_rows` reads; optional precomputed,
    logging_steps, learning_rate, seed, shared_prefix, micro_batch_tokens.
    """
    builders: dict[str, Callable[..., Trainer]] = {
        "fastdpo": _fastdpo, "trl": _trl, "unsloth": _unsloth,
    }  # fmt: skip
    arguments = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": case["pairs"] // case["accumulation"],
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_checkpointing": case["checkpointing"],
        "max_steps": case["updates"],
        "learning_rate": case.get("learning_rate", 1e-5),
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "max_grad_norm": 1e9,  # the work of clipping, and norms that can be compared
        "bf16": case["device"] == "cuda",
        "logging_steps": case.get("logging_steps", 10),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": case["device"] == "cpu",
        "beta": 0.1,
        "seed": case.get("seed", SEED),
    }
    return builders[case["library"]](case, folder, arguments, callbacks)


def _peft_config(case: Mapping[str, Any]) -> Any:
    from fastdpo.modeling.adapters import lora_config

    return None if case["tuning"] == "full" else lora_config(LORA_RANK, LORA_ALPHA, 0.0, None)


def _fastdpo(
    case: Mapping[str, Any], folder: Path, arguments: dict[str, Any], callbacks: list
) -> Trainer:
    from fastdpo import DPOConfig, DPOTrainer

    model, tokenizer, rows = model_and_rows(case)
    own = {name: case[name] for name in ("shared_prefix", "micro_batch_tokens") if name in case}
    return DPOTrainer(
        model,
        args=DPOConfig(
            **arguments, **own, truncation_mode="keep_start", ref_cache=str(folder / "reference")
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=_peft_config(case),
    )


def _trl(
    case: Mapping[str, Any], folder: Path, arguments: dict[str, Any], callbacks: list
) -> Trainer:
    import trl

    model, tokenizer, rows = model_and_rows(case)
    # TRL leaves the adapter's first weights to the caller.
    torch.manual_seed(case.get("seed", SEED))
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            **arguments, precompute_ref_log_probs=bool(case.get("precomputed", False))
        ),
        train_dataset=_dataset(rows, folder),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=_peft_config(case),
    )


def _unsloth(
    case: Mapping[str, Any], folder: Path, arguments: dict[str, Any], callbacks: list
) -> Trainer:
    """Unsloth's patched TRL; it loads models by folder only, and adds its adapter itself."""
    if case["tuning"] != "lora" or not torch.cuda.is_available():
        raise MissingPeer("unsloth is asked for LoRA on CUDA only")
    from unsloth import FastLanguageModel  # first: it patches what the others import

    model, tokenizer, rows = model_and_rows(case)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del model
    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "model"), load_in_4bit=False, dtype=getattr(torch, case["dtype"])
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        use_gradient_checkpointing="unsloth" if case["checkpointing"] else False,
    )
    import trl

    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments),
        train_dataset=_dataset(rows, folder),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _dataset(rows: list[dict], folder: Path) -> Any:
    """As users load it, from a file: TRL keeps its reference log-probs beside a file only."""
    from datasets import Dataset

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Dataset.from_json(str(path), cache_dir=str(folder / "datasets"))


def facts_of(trainer: Any) -> dict[str, Any]:
    """What every contender must do in each update, read off ours.

    `useful_tokens` counts every token that a pair's rows share once; `floor_flops` are the matrix
    products of the linear layers on them, forward and backward, and of the head on the scored
    tokens; attention is left out.
    """
    from fastdpo.batching import group_tokens, shared_prefix_length
    from fastdpo.modeling.head import get_backbone, get_lm_head

    layers = sum(
        (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight.numel()
        for name, module in get_backbone(trainer.policy).named_modules()
        if "lora_" not in name and (isinstance(module, nn.Linear) or hasattr(module, "base_layer"))
        and not name.endswith("base_layer")
    )  # fmt: skip
    head = get_lm_head(trainer.policy).weight.numel()
    trains_all = not trainer.trains_adapter
    useful, flops = [], []
    for indices in trainer.get_train_dataloader().batch_sampler:
        groups = [trainer.train_groups[i] for i in indices]
        tokens = sum(group_tokens(group) for group in groups)
        shared = sum(shared_prefix_length(group) - len(group.prompt_ids) for group in groups)
        scored = sum(len(c) for group in groups for c in group.completions) - shared
        useful.append(tokens)
        flops.append(2 * layers * tokens * (3 if trains_all else 2))
        flops[-1] += 2 * head * scored * (3 if trains_all else 2)
    return {"useful_tokens": useful, "floor_flops": flops}


def limit_memory(device: torch.device, gib: float) -> None:
    """Let this process have no more than a card of `gib` GiB would; on the CPU, that much more."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
        return
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    now_kib = int(next(line for line in status if line.startswith("VmData")).split()[1])
    limit = int(now_kib * 1024 + gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
