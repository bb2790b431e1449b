"""What the planner chooses for a GPU, a model and its pairs, and what it says about it."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from bench.synthetic import random_model
from fastdpo.batching import group_tokens
from fastdpo.config import DPOConfig
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.planner import (
    Plan,
    Training,
    Workload,
    architecture_named,
    compare,
    gpu_spec,
    longest_pair,
    make_plan,
    plan_for_run,
    training_of,
)
from fastdpo.planner.gpus import KNOWN, SIZES_GIB
from fastdpo.planner.memory_layout import MemoryLayout, MemoryStrategy
from fastdpo.planner.search import allocatable_bytes
from fastdpo.planner.speed import LAUNCH_SECONDS, LAYER_LAUNCHES
from fastdpo.planner.terms import GIB
from tests.planner.test_terms import SIZES, groups
from tests.project.test_layering import ROOT, imports_of


@pytest.fixture(scope="module")
def llama():
    return architecture_named("llama-3.1-8b")


def planned(architecture, size, longest=2048, update=65536, host=64, **options) -> Plan:
    training = options.pop("training", Training())
    return make_plan(
        architecture, training, gpu_spec(size), Workload(longest, update),
        host_bytes=int(host * GIB), **options,
    )  # fmt: skip


def test_more_memory_is_never_slower_and_the_card_is_nearly_full(llama):
    plans = [planned(llama, f"{size} GB") for size in (8, 12, 16, 24, 48, 80)]
    assert all(made.fits for made in plans)
    kept = [made.activation_counts.get("keep", 0) for made in plans]
    assert kept[0] < kept[-1]
    for made in plans[:-1]:
        assert made.peak_bytes > 0.85 * made.gpu_bytes, made.describe()
    assert plans[-1].activation_counts == {"keep": 32}
    assert plans[-1].micro_batch_tokens > plans[2].micro_batch_tokens


def test_the_kept_layers_are_the_last_and_another_one_would_not_fit(llama):
    made = planned(llama, "12 GB", micro_batch_tokens=4096)
    kept = made.activation_plan.count("keep")
    assert 1 < kept < 32
    assert made.activation_plan == ("recompute",) * (32 - kept) + ("keep",) * kept
    layout = MemoryLayout(
        llama, Training(attention="varlen", kernels="fused"), Workload(2048, 65536).shape(4096),
        MemoryStrategy(
            made.optimizer, made.embeddings_on_host, made.norm_tile_tokens, made.mlp_tile_tokens
        ),
    )  # fmt: skip
    allocatable = allocatable_bytes(12 * GIB)
    assert layout.peak(made.activation_plan) == made.allocated_bytes <= allocatable
    assert layout.peak(("recompute",) * (31 - kept) + ("keep",) * (kept + 1)) > allocatable


def test_attention_is_kept_where_pairs_are_long(llama):
    """Whole layers save more time for their bytes at 4,096 tokens, attention at 16,384 a pair."""
    options = {"training": Training(tuning="qlora")}
    short, long = (planned(llama, "RTX 4090", n, 8 * n, **options) for n in (4096, 16384))
    assert short.activation_counts.keys() <= {"keep", "recompute"}
    assert long.activation_counts["keep_attention"] > 16, long.describe()
    assert long.peak_bytes > 0.95 * long.gpu_bytes, "as much is kept as fits"
    blocks = Training(tuning="qlora", attention="flex")
    assert (
        "keep_attention" not in planned(llama, "RTX 4090", 16384, training=blocks).activation_plan
    )


def test_a_micro_batch_is_never_so_short_that_launches_bind(llama):
    """Where the GPU has room, launches of a micro-batch take less than its products do."""
    small = architecture_named("llama-3.2-1b")
    made = planned(small, "H100", 256)
    of_launches = LAYER_LAUNCHES["fused"] * small.layers * LAUNCH_SECONDS
    assert made.micro_batch_tokens / made.tokens_per_second > 1.5 * of_launches
    shortest = planned(small, "H100", 256, micro_batch_tokens=256)
    assert 256 / shortest.tokens_per_second == pytest.approx(of_launches)
    slower = planned(small, "H100", 256, micro_batch_tokens=256, training=Training(kernels="eager"))
    assert slower.tokens_per_second < 0.7 * shortest.tokens_per_second


def test_long_pairs_go_to_the_host_as_far_as_it_has_room(llama):
    made = planned(llama, "24 GB", 65536)
    assert made.fits, made.describe()
    assert made.activation_plan.count("offload") > 10
    assert made.pinned_host_bytes >= made.activation_plan.count("offload") * 65536 * 4096 * 2
    less = planned(llama, "24 GB", 65536, host=7)
    assert less.fits
    assert less.pinned_host_bytes <= 7 * GIB < made.pinned_host_bytes
    assert less.mlp_tile_tokens is not None
    poor = planned(llama, "24 GB", 65536, host=1)
    assert not poor.fits
    assert poor.pinned_host_bytes > GIB
    assert "pinned host memory and may have 1.00 GiB" in poor.describe()


def test_what_does_not_fit_says_what_would_help(llama):
    made = planned(llama, "6 GB", 32768)
    assert not made.fits
    said = made.describe()
    assert "llama-3.1-8b does not fit" in said
    assert "--max_length" in said
    assert "--optim adamw_8bit" in said
    full = planned(llama, "24 GB", training=Training("full"))
    assert not full.fits
    assert "--qlora" in full.describe()


def test_the_optimizer_is_changed_only_where_allowed_and_needed(llama):
    longest = next(
        tokens
        for tokens in range(4096, 65536, 256)
        if not planned(llama, "8 GB", tokens, tokens).fits
    )
    saved = planned(llama, "8 GB", longest, longest, change_optimizer=True)
    assert saved.fits
    assert saved.optimizer == "adamw_8bit"
    assert "--optim adamw_8bit" in saved.describe()
    assert planned(llama, "8 GB", 2048, 2048, change_optimizer=True).optimizer != "adamw_8bit"


def test_no_recomputation_where_the_user_wants_none(llama):
    made = planned(llama, "24 GB", recompute=False)
    assert made.activation_counts == {"keep": 32}
    assert not planned(llama, "8 GB", recompute=False).fits


def test_the_aims_of_the_project_are_within_reach():
    aims = {
        "llama-2-7b": {"6 GB": 1024, "8 GB": 4096},
        "llama-3.1-8b": {"8 GB": 2048, "12 GB": 8192, "16 GB": 16384, "24 GB": 40960},
    }
    for alias, gpus in aims.items():
        architecture = architecture_named(alias)
        for size, length in gpus.items():
            found = longest_pair(architecture, Training(), gpu_spec(size), host_bytes=64 * GIB)
            assert found is not None
            assert found.fits
            assert found.micro_batch_tokens // 2 >= length, (alias, size)


def test_tied_embeddings_stay_on_the_card():
    gemma = architecture_named("gemma-2-9b")
    made = planned(gemma, "8 GB", 2048, 2048, change_optimizer=True)
    assert not made.embeddings_on_host
    assert made.terms["head"] == 0


def test_predicted_and_measured_are_compared(llama):
    made = replace(planned(llama, "12 GB"), allocated_bytes=11 * GIB)
    said = compare(made, 10 * GIB)
    assert said == "Peak memory: 10.00 GiB measured, 11.00 GiB predicted (+10.0%)."


def test_cards_by_size_and_name():
    assert gpu_spec("24GiB").memory_bytes == gpu_spec("24 GB").memory_bytes == 24 * GIB
    assert gpu_spec("rtx-4090").tflops == gpu_spec("24").tflops
    assert gpu_spec("7.5").name.startswith("7.5 GiB, rates of an RTX 2060")
    for wrong in ("huge", "", "0", "24 MB", "6000", "RTX 4090 Laptop GPU", "A", "GeForce RTX"):
        with pytest.raises(ValueError, match=r"--gpu is .* auto, a size such as 24GiB"):
            gpu_spec(wrong)


@pytest.mark.parametrize(
    ("written", "name", "gib"),
    [
        ("4090", "RTX 4090", 23.64),
        ("RTX 4090", "RTX 4090", 23.64),
        ("rtx4090", "RTX 4090", 23.64),
        ("GeForce RTX 4090", "RTX 4090", 23.64),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 23.64),
        ("nvidia-rtx-4090-24gb", "RTX 4090", 23.64),
        ("3090 Ti", "RTX 3090 Ti", 23.68),
        ("3090ti", "RTX 3090 Ti", 23.68),
        ("3090", "RTX 3090", 23.68),
        ("RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", 15.7),
        ("A100", "A100", 79.1),
        ("NVIDIA A100 80GB PCIe", "A100", 79.1),
        ("A100-40GB", "A100 40GB", 39.55),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 39.55),
        ("A100 40G", "A100 40GB", 39.55),
        ("NVIDIA H100 80GB HBM3", "H100", 79.1),
        ("Tesla T4", "T4", 14.56),
        ("Tesla V100-PCIE-32GB", "V100 32GB", 31.54),
        ("NVIDIA A10G", "A10G", 22.0),
        ("NVIDIA RTX A6000", "A6000", 47.4),
        ("NVIDIA RTX 6000 Ada Generation", "6000 Ada", 47.4),
        ("L40S", "L40S", 44.4),
    ],
)
def test_a_name_is_known_as_people_and_nvidia_smi_write_it(written, name, gib):
    """The memory is what a driver leaves, less than what is sold; a size stays a size."""
    found = gpu_spec(written)
    assert (found.name, found.memory_bytes / GIB) == (name, pytest.approx(gib, abs=0.01))
    assert found.memory_bytes < found.sold_gib * GIB


def test_no_known_gpu_is_mistaken_for_a_size_or_another():
    for gpu in KNOWN:
        assert gpu_spec(gpu.name) == gpu
        assert 0.9 < gpu.memory_bytes / (gpu.sold_gib * GIB) < 1
    for size in (*SIZES_GIB, 40, 96, 141):
        assert gpu_spec(str(size)).memory_bytes == size * GIB


def test_the_plan_of_a_run_comes_from_its_model_and_pairs(tmp_path):
    base = random_model(LlamaConfig(**SIZES), dtype=torch.bfloat16, device="cpu", load_in_4bit=True)
    model = add_adapter(base, lora_config(4, 8, 0.0, ["q_proj", "v_proj"]))
    assert training_of(model, "adamw_torch") == Training(
        "qlora",
        lora_r=4,
        optimizer="adamw_torch",
        adapter_entries=sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
    )
    lengths = [group_tokens(group) for group in groups(6)]
    config = DPOConfig(str(tmp_path), use_cpu=True, optim="adamw_torch")
    scored = {"pairs_per_update": 4, "scored_tokens": 300}
    assert plan_for_run(model, config, lengths, **scored) is None
    made = plan_for_run(model, config, lengths, gpu=gpu_spec("1 GB"), host_bytes=GIB, **scored)
    assert made is not None
    assert made.fits
    assert made.micro_batch_tokens == 384  # four groups of 88 tokens, rounded up to 128
    assert made.activation_plan == ("keep",) * 3
    config = DPOConfig(str(tmp_path), use_cpu=True, micro_batch_tokens=128)
    made = plan_for_run(model, config, lengths, gpu=gpu_spec("1 GB"), host_bytes=GIB, **scored)
    assert made is not None
    assert made.micro_batch_tokens == 128


def test_the_requested_attention_reaches_the_plan(tmp_path):
    config = LlamaConfig(**SIZES | {"head_dim": 16})
    base = random_model(config, dtype=torch.float32, device="cpu", load_in_4bit=False)
    model = add_adapter(base, lora_config(4, 8, 0.0, None))

    def allocated(**options):
        run = {"pairs_per_update": 4, "scored_tokens": 300, "repeated_tokens": 500}
        args = DPOConfig(str(tmp_path), use_cpu=True, **options)
        made = plan_for_run(model, args, [900, 1000], gpu=gpu_spec("1 GB"), host_bytes=GIB, **run)
        return made.allocated_bytes

    auto = allocated()  # float32, which flash kernels do not take
    assert auto == allocated(attention="flex") == allocated(packing="off")
    assert allocated(attention="sdpa") > auto
    with pytest.raises(ValueError, match="--attention varlen cannot be used here: dtype is"):
        allocated(attention="varlen")
    base.config.attention_dropout = 0.1
    assert allocated() == auto
    assert allocated(disable_dropout=False) == allocated(attention="sdpa")


def test_the_planner_imports_no_model_code():
    """So `python -m fastdpo.plan` answers quickly: what its modules import when they are loaded."""
    seen, queue = set(), ["fastdpo.planner", "fastdpo.modeling.families"]
    while queue:
        module = queue.pop()
        path = ROOT / module.replace(".", "/")
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not source.is_file():
            continue
        seen.add(module)
        for each in imports_of(source.read_text(), module, path.is_dir()):
            if not each.in_function:
                top = each.target.split(".")[0]
                assert top not in ("peft", "bitsandbytes", "fastdpo_kernels"), (module, each.target)
                queue += [each.target, each.target.rpartition(".")[0]] if top == "fastdpo" else []
    assert "fastdpo.modeling.attention_backends" in seen
    assert not seen & {"fastdpo.modeling.attention", "fastdpo.modeling.adapters"}


def test_pairs_that_do_not_fit_whole_are_planned_row_by_row(tmp_path):
    model = add_adapter(
        random_model(LlamaConfig(**SIZES), dtype=torch.bfloat16, device="cpu", load_in_4bit=True),
        lora_config(16, 32, 0.0, None),
    )
    config = DPOConfig(str(tmp_path), use_cpu=True)
    run = {"pairs_per_update": 2, "scored_tokens": 100_000, "host_bytes": 0}
    gpu = gpu_spec("2")
    whole = plan_for_run(model, config, [100_000], gpu=gpu, **run)
    assert whole is not None
    size = whole.gpu_bytes
    while whole.fits:
        size -= 2**26
        gpu = replace(gpu, memory_bytes=size)
        whole = plan_for_run(model, config, [100_000], gpu=gpu, **run)
        assert whole is not None
    split = plan_for_run(model, config, [100_000], max_seqlen=50_000, gpu=gpu, **run)
    assert split is not None
    assert split.fits
    assert 50_000 <= split.micro_batch_tokens < 100_000
    assert "completions run one by one" in split.describe()
