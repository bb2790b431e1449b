"""Whole runs with the base in host memory: every number is that of a run with it on the device."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo import DPOConfig, evaluate, merge, score
from fastdpo.modeling import host_blocks
from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.base_weights import host_weights
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import load_model
from fastdpo.options.passes import check_base_weights
from fastdpo.planner import from_model, plan_for_run
from fastdpo.ref_cache import reference_identity
from tests.tiny_trainer import CONFIG, HELD_OUT, ROWS, TOKENIZER, tiny_base, tiny_trainer
from tests.trainer.test_dpo_trainer import assert_same_weights, weights, without_time
from tests.trainer.test_layout import GPU, layout_of, plan_of

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of four layers with its tokenizer."""
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = 4
    path = tmp_path_factory.mktemp("runs") / "base"
    tiny_base(config).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_layer_a_block(monkeypatch):
    monkeypatch.setattr(host_blocks, "SMALL_BYTES", 1)


class OutOfMemory(TrainerCallback):
    """Lets memory run out once, in the middle of the backward of the second update."""

    def __init__(self):
        self.trainer, self.happened = None, False

    def on_step_begin(self, args, state, control, **_):
        if state.global_step != 1 or self.happened:
            return
        layer = decoder_layers(self.trainer.policy)[1]

        def fail(*_):
            hook.remove()
            self.happened = True
            raise torch.OutOfMemoryError("injected")

        hook = layer.mlp.register_full_backward_hook(fail)


@pytest.fixture
def trainer_of(folder, tmp_path, monkeypatch):
    """A trainer over a new copy of the base, its reference store its own."""

    def build(base_weights, *, four_bit=False, moved=False, name=None, **options):
        name = name or base_weights
        monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / f"cache-{name}"))
        model = load_model(
            str(folder), dtype=torch.bfloat16 if four_bit else torch.float32, load_in_4bit=four_bit,
            base_weights="gpu" if moved else base_weights,
        )  # fmt: skip
        torch.manual_seed(0)
        failing = OutOfMemory()
        trainer = tiny_trainer(
            model, tmp_path / name, dropout=0.1, base_weights=base_weights, callbacks=[failing],
            save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            log_completions=0 if four_bit else 1, max_steps=3, rows=ROWS[:24],
            held_out=HELD_OUT[:2], **options,
        )  # fmt: skip
        failing.trainer = trainer
        trainer.layout.activation_plan = ("keep", "offload", "keep_attention", "recompute")
        trainer.layout.micro_batch_tokens, trainer.layout.most_group_tokens = 256, 40
        trainer.layout.apply(trainer.policy)
        return trainer

    return build


def numbers(trainer):
    """The log without the seconds that each run has its own of."""
    return [
        {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
        for line in without_time(trainer.state.log_history)
    ]


@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_a_run_is_that_with_resident_weights_bit_for_bit(trainer_of, tmp_path, four_bit):
    """Split pairs, dropout, evaluation, generation, a lack of memory; saved, and resumed."""
    resident = trainer_of("gpu", four_bit=four_bit)
    resident.train()
    streamed = trainer_of("host", four_bit=four_bit, moved=four_bit)
    assert streamed.layout.base_buffers == 2
    assert host_weights(resident.policy) is None
    on_host = host_weights(streamed.policy)
    assert on_host.buffer_bytes < on_host.host_bytes
    streamed.train()
    for trainer in (resident, streamed):
        callbacks = trainer.callback_handler.callbacks
        assert [each.happened for each in callbacks if isinstance(each, OutOfMemory)] == [True]
    assert_same_weights(weights(streamed), weights(resident))
    assert numbers(streamed) == numbers(resident)
    assert streamed.state.total_flos == resident.state.total_flos
    for step in (2, 3):
        paths = [tmp_path / name / f"checkpoint-{step}" / ADAPTER for name in ("gpu", "host")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    if not four_bit:
        texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("gpu", "host")]
        assert texts[0] == texts[1]
    identities = [reference_identity(each.policy, torch.float32) for each in (resident, streamed)]
    assert identities[0] == identities[1]
    for base_weights in ("host",) if four_bit else ("host", "gpu"):
        again = trainer_of(base_weights, four_bit=four_bit, name=f"again-{base_weights}")
        again.train(resume_from_checkpoint=str(tmp_path / "host" / "checkpoint-2"))
        assert again.layout.base_buffers == (2 if base_weights == "host" else 0)
        assert_same_weights(weights(again), weights(resident))


def test_a_run_by_name_loads_its_base_to_the_host(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(str(folder), tmp_path / "out", base_weights="host", max_steps=1)
    assert host_weights(trainer.policy) is not None
    trainer.train()
    assert trainer.layout.base_buffers == 2


def test_a_run_is_laid_out_as_its_plan_has_it(folder, tmp_path, monkeypatch):
    """On the host as requested, or where the base was loaded to; its own memory is not missed."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(from_model, "pinnable_host_bytes", lambda: 0)
    made = {}
    for loaded, requested in (("gpu", "gpu"), ("gpu", "host"), ("gpu", "auto"), ("host", "auto")):
        model = load_model(str(folder), dtype=torch.float32, base_weights=loaded)
        trainer = tiny_trainer(model, tmp_path, activation_checkpointing=True)
        trainer.user_args.base_weights = requested
        planned = plan_of(trainer)
        assert layout_of(trainer, planned).base_buffers == planned.base_buffers
        made[loaded, requested] = planned.base_buffers
    assert made == {
        ("gpu", "gpu"): 0, ("gpu", "host"): 3, ("gpu", "auto"): 0, ("host", "auto"): 3,
    }  # fmt: skip
    own = host_weights(trainer.policy).host_bytes
    planned = plan_for_run(
        trainer.policy, trainer.user_args, [40] * 8, pairs_per_update=8, scored_tokens=100, gpu=GPU
    )
    assert planned.host_bytes == own
    assert planned.fits


def test_trained_weights_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--base_weights is host, and all weights are trained"):
        tiny_trainer(str(folder), tmp_path, tuning="full", base_weights="host")
    with pytest.raises(ValueError, match=r"train an adapter \(--lora, --qlora\)"):
        check_base_weights("host", trains_adapter=False)
    check_base_weights("auto", trains_adapter=False)
    with pytest.raises(ValueError, match="base_weights"):
        DPOConfig(base_weights="disk")


def test_a_layout_of_before_leaves_the_base_where_it_is():
    saved = ExecutionLayout(512, base_buffers=3).as_json()
    assert ExecutionLayout.from_json(saved).base_buffers == 3
    del saved["base_buffers"]
    assert ExecutionLayout.from_json(saved).base_buffers == 0


@pytest.fixture
def trained(folder, tmp_path, monkeypatch):
    """A folder with an adapter on the base, and held-out pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(load_model(str(folder), dtype=torch.float32), tmp_path / "out",
                           rows=ROWS[:8], max_steps=1)  # fmt: skip
    trainer.train()
    trainer.save_model()
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in HELD_OUT))
    return ["--adapter", "out", "--model", str(folder), "--dataset", "dev.jsonl"]


@pytest.mark.parametrize("qlora", [[], ["--qlora"]], ids=["whole", "4-bit"])
def test_commands_say_the_same_of_a_base_on_the_host(trained, tmp_path, qlora):
    found = {}
    for where in ("gpu", "host"):
        common = [*trained, *qlora, "--base_weights", where]
        generating = ["--num_completions", "2", "--max_new_tokens", "4"]
        evaluate.main([*common, *generating, "--output_file", f"{where}.json"])
        score.main([*common, "--output_file", f"{where}.jsonl"])
        found[where] = [(tmp_path / f"{where}.{end}").read_text() for end in ("json", "jsonl")]
    assert found["gpu"] == found["host"]


def test_a_merge_says_the_same_of_a_base_on_the_host(trained, tmp_path, capsys):
    said, merged = [], []
    for where in ("gpu", "host"):
        common = [*trained, "--qlora", "--base_weights", where, "--report_pairs", "3"]
        with_others = ["--onto", "dequantized", "--output_dir", f"merged-{where}"]
        merge.main([*common, *with_others])
        said.append(capsys.readouterr().out.replace(f"merged-{where}", "merged"))
        merged.append(load_file(tmp_path / f"merged-{where}" / "model.safetensors"))
    tables = [[line for line in text.splitlines() if "%" in line or "nat" in line] for text in said]
    assert tables[0] == tables[1]
    assert len(tables[0]) > 2
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
