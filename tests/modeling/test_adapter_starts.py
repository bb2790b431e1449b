"""PEFT's initializations: right where the base stays as it is, else refused by name."""

import json
import logging
import warnings

import pytest
import torch
from peft import EvaConfig, KasaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.cli.parser import command
from fastdpo.evaluate import main as evaluate
from fastdpo.modeling.adapter_starts import start_fault
from fastdpo.modeling.adapters import load_adapter
from fastdpo.modeling.reference_model import FROZEN_ADAPTER, reference_from_copy
from fastdpo.modeling.scoring import score_pairs
from fastdpo.score import main as score
from tests.tiny_trainer import TOKENIZER, preference_rows, tiny_base, tiny_trainer

ROWS = preference_rows(8)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-4}
MOVED = ["pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "loftq"]


def config(start=True, **options):
    made = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    made.init_lora_weights = start  # PEFT asks for scipy or warns if it is given at once
    return made


def trainer_of(tmp_path, model, **options):
    return tiny_trainer(
        model, tmp_path / "out", tuning="as it is", rows=ROWS, held_out=None, eval_strategy="no",
        ref_cache="off", max_steps=1, **options,
    )  # fmt: skip


def from_config(tmp_path, peft_config, **options):
    """A trainer that makes the adapter itself."""
    args = DPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=1, save_strategy="no",
        ref_cache="off", use_cpu=True, disable_tqdm=True, report_to="none", **options,
    )  # fmt: skip
    return DPOTrainer(
        tiny_base(), args=args, train_dataset=ROWS, processing_class=TOKENIZER,
        peft_config=peft_config,
    )  # fmt: skip


def logps(model, trainer):
    return score_pairs(model, trainer.train_groups, trainer.layout).logps


def assert_right(trainer):
    """Policy and reference are the base at the start, and still the policy's start afterwards."""
    base = logps(tiny_base(), trainer)
    provider = trainer.reference.logps(trainer.train_groups, "train")
    torch.testing.assert_close(provider, logps(trainer.policy, trainer), **TOLERANCE)
    torch.testing.assert_close(provider, base, **TOLERANCE)
    trainer.train()
    assert trainer.first_update_margin < 1e-4
    torch.testing.assert_close(
        trainer.reference.logps(trainer.train_groups, "train"), base, **TOLERANCE
    )
    return trainer


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica", "lora_ga"])
def test_a_start_that_leaves_the_base_alone_is_right(tmp_path, caplog, start):
    options = {"lora_ga_config": LoraGAConfig()} if start == "lora_ga" else {}
    trainer = assert_right(from_config(tmp_path, config(start, **options)))
    trainer.save_model()
    with caplog.at_level(logging.WARNING):
        reloaded = load_adapter(tiny_base(), str(tmp_path / "out"))
    torch.testing.assert_close(
        logps(reloaded, trainer), logps(trainer.policy, trainer), **TOLERANCE
    )
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] == (True if start == "lora_ga" else start)


def test_eva_is_right_once_it_was_computed_and_refused_before(tmp_path):
    eva = config("eva", eva_config=EvaConfig(rho=1.0))
    with pytest.raises(
        ValueError, match=r"init_lora_weights is 'eva'.*initialize_lora_eva_weights"
    ):
        from_config(tmp_path, eva)
    model = get_peft_model(tiny_base(), eva)
    drawn = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    data = [{"input_ids": torch.randint(0, 256, (4, 24))} for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    changed = [
        n for n, p in model.named_parameters() if n in drawn and not torch.equal(p, drawn[n])
    ]
    assert changed
    assert_right(trainer_of(tmp_path, model))


def test_a_random_start_is_compared_with_itself(tmp_path):
    torch.manual_seed(3)
    trainer = from_config(tmp_path, config(False))
    start = logps(trainer.policy, trainer)
    assert abs(start - logps(tiny_base(), trainer)).max() > 1
    trainer.train()
    assert trainer.first_update_margin < 1e-4
    torch.testing.assert_close(
        trainer.reference.logps(trainer.train_groups, "train"), start, **TOLERANCE
    )


@pytest.mark.parametrize("start", MOVED)
def test_a_start_that_takes_from_the_base_is_refused_by_name(tmp_path, start):
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}', which moves a part"):
        from_config(tmp_path, config(start))


def test_lora_ga_with_gradients_takes_from_the_base_and_is_refused(tmp_path):
    base = tiny_base()
    for module in base.modules():
        if isinstance(module, torch.nn.Linear):
            module._peft_loraga_grad = torch.randn_like(module.weight)
    lora_ga = config("lora_ga", lora_ga_config=LoraGAConfig())
    model = get_peft_model(base, lora_ga)
    with pytest.raises(ValueError, match="'default' of the model: init_lora_weights is 'lora_ga'"):
        trainer_of(tmp_path, model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_model_that_was_made_so_is_refused(tmp_path, start):
    with pytest.raises(ValueError, match=f"the adapter 'default' of the model: .* '{start}'"):
        trainer_of(tmp_path, get_peft_model(tiny_base(), config(start)))


@pytest.mark.parametrize("start", [None, 1, "xavier", ["pissa"], {"name": "pissa"}])
def test_what_is_not_known_is_refused(start):
    assert "init_lora_weights is" in start_fault({"init_lora_weights": start})


def test_what_no_name_tells_is_seen_in_the_base(tmp_path, monkeypatch):
    """KaSA under another name stands for any initialization that writes to the base."""
    kasa = config(True, kasa_config=KasaConfig())
    with pytest.raises(ValueError, match="kasa_config"):
        from_config(tmp_path, kasa)
    monkeypatch.setattr("fastdpo.modeling.adapter_starts.start_fault", lambda config: None)
    monkeypatch.setattr("fastdpo.modeling.adapters.check_peft_type", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"has changed model\.layers\.0\..*weight"):
        from_config(tmp_path, kasa)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_base().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base = tiny_base()
    base.name_or_path = str(folder / "base")
    torch.manual_seed(1)
    get_peft_model(base, config(False)).save_pretrained(folder / "adapter")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.parametrize("start", ["pissa", "loftq", "lora_ga"])
@pytest.mark.parametrize("main", [score, evaluate], ids=["score", "evaluate"])
def test_an_edited_config_is_refused_where_adapters_are_read(
    folders, tmp_path, monkeypatch, capsys, start, main
):
    path = folders / "adapter" / "adapter_config.json"
    text = path.read_text()
    output = tmp_path / "out.jsonl"
    argv = ["--adapter", str(folders / "adapter"), "--dataset", str(folders / "pairs.jsonl"),
            "--output_file", str(output)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["it", *argv])
    try:
        path.write_text(json.dumps({**json.loads(text), "init_lora_weights": start}))
        assert command(main) == 2
        assert f"init_lora_weights is '{start}'" in capsys.readouterr().err
        assert not output.exists()
        with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
            trainer_of(tmp_path, str(folders / "adapter"))
        with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
            trainer_of(tmp_path, str(folders / "base"), ref_model=str(folders / "adapter"))
    finally:
        path.write_text(text)


def test_the_frozen_copy_runs_no_initialization(monkeypatch):
    """Were it to run PiSSA again, the base below both adapters would change."""
    model = get_peft_model(tiny_base(), config("pissa"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    reference = reference_from_copy(model)
    after = dict(model.named_parameters())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for name, tensor in reference.tensors().items():
        twin = name.replace(".weight", f".{FROZEN_ADAPTER}.weight")
        assert torch.equal(tensor, before[twin.replace(FROZEN_ADAPTER, "default")]), name
