"""Every type of adapter of PEFT: trained right, on whole and 4-bit weights, or refused by name."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import adapters_disabled, add_adapter, load_adapter
from fastdpo.modeling.peft_types import LORA_VARIANTS, REFUSED, TRAINED, check_peft_type
from fastdpo.modeling.scoring import score_pairs
from tests.tiny_trainer import TOKENIZER, preference_rows

CONFIG = LlamaConfig(
    vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=256, eos_token_id=257, tie_word_embeddings=False,
)  # fmt: skip
ROWS = preference_rows(4)
LINEARS = ["q_proj", "v_proj", "down_proj"]
TOKENS = TOKENIZER(" good").input_ids

OPTIONS = {
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS, "target_modules": ["embed_tokens"]},
    "BEFT": {"target_modules": ["v_proj"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 64},
    "C3A": {"block_size": 16},
    "OFT": {"oft_block_size": 16},
    "BOFT": {"boft_block_size": 16},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "WAVEFT": {"n_frequency": 64},
    "FOURIERFT": {"n_frequency": 64},
    "LORA": {"r": 4},
}
"""What a type needs for a model this small."""


def config_of(kind):
    options = {"target_modules": LINEARS} | OPTIONS.get(kind, {})
    return CONFIGS[PeftType[kind]](task_type="CAUSAL_LM", **options)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def trainer_of(model, folder, config=None, **options):
    arguments = {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    arguments |= {"per_device_train_batch_size": 4, "save_strategy": "no", "ref_cache": "off"}
    arguments |= {"disable_tqdm": True, "use_cpu": True, "activation_checkpointing": False}
    return DPOTrainer(
        model,
        args=DPOConfig(str(folder), **arguments | options),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        peft_config=config,
    )


def trained_tensors(trainer):
    tensors = trainer.policy.named_parameters()
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor.requires_grad}


def logps(model, trainer):
    return score_pairs(model, trainer.train_groups).logps


def assert_trained_right(base_folder, folder, config):
    """It starts at its reference, everything of it moves, the base stays, and it can be loaded."""
    trainer = trainer_of(base_folder, folder, config)
    before = trained_tensors(trainer)
    trainer.train()
    assert abs(trainer.first_update_margin) < 1e-4
    after = trained_tensors(trainer)
    assert [name for name in before if torch.equal(before[name], after[name])] == [], "not trained"
    found = logps(trainer.policy, trainer)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with adapters_disabled(trainer.policy):
        assert (logps(trainer.policy, trainer) == logps(base, trainer)).all()
    trainer.save_model()
    loaded = load_adapter(base, str(folder), trainable=True)
    assert (logps(loaded, trainer) == found).all()
    return trainer


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_types(base_folder, tmp_path, kind):
    assert_trained_right(base_folder, tmp_path / "out", config_of(kind))


OFTEN = ("SHIRA", "VBLORA", "TRAINABLE_TOKENS", "OFT")
"""Types that resume in every run of the tests: masks, shared tensors, embeddings, rotations."""


@pytest.mark.parametrize("kind", TRAINED)
def test_they_resume_and_continue(base_folder, tmp_path, kind, soak):
    if kind not in OFTEN and not soak:
        pytest.skip("the long form: --soak")
    resumes_and_continues(base_folder, tmp_path, config_of(kind))


def resumes_and_continues(base_folder, tmp_path, config):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(base_folder, tmp_path / "whole", copy.deepcopy(config), **options)
    whole.train()
    cut = {"max_steps": 1} | options
    trainer_of(base_folder, tmp_path / "cut", copy.deepcopy(config), **cut).train()
    resumed = trainer_of(base_folder, tmp_path / "cut", copy.deepcopy(config), **options)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in trained_tensors(whole).items():
        assert torch.equal(tensor, trained_tensors(resumed)[name]), name
    further = trainer_of(str(tmp_path / "whole" / "checkpoint-2"), tmp_path / "on", max_steps=1)
    assert further.reference.reference.adapter == "reference"
    assert (logps(further.policy, whole) == logps(whole.policy, whole)).all()
    further.train()
    assert abs(further.first_update_margin) < 1e-4


def test_every_type_of_peft_is_in_a_table():
    """A new type is refused until it has been tried."""
    known = {kind.value for kind in PeftType}
    assert TRAINED.keys() | REFUSED.keys() == known
    assert not TRAINED.keys() & REFUSED.keys()
    config = LoraConfig(task_type="CAUSAL_LM")
    config.peft_type = "NEWEST"
    with pytest.raises(ValueError, match=r"LoraConfig \(NEWEST\) cannot .* has not tried it"):
        check_peft_type(config)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_types(base_folder, tmp_path, kind):
    config = LoraConfig(task_type="CAUSAL_LM")
    config.peft_type = PeftType[kind]
    with pytest.raises(ValueError, match=rf"\({kind}\) cannot be used here: it .* Use LoRA"):
        trainer_of(base_folder, tmp_path / "out", config)


def test_a_model_that_has_such_an_adapter_already_is_refused(base_folder, tmp_path):
    config = CONFIGS[PeftType.PREFIX_TUNING](task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    with pytest.raises(ValueError, match=r"PrefixTuningConfig \(PREFIX_TUNING\).*virtual tokens"):
        trainer_of(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "prefix")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        load_adapter(base, str(tmp_path / "prefix"))


# LoRA's own variants

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "modules": {"modules_to_save": ["embed_tokens", "input_layernorm"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "block-diagonal": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"]
        ),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(base_folder, tmp_path, variant):
    options = {"r": 4, "target_modules": LINEARS} | VARIANTS[variant]
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    trainer = assert_trained_right(base_folder, tmp_path / "out", config)
    if variant in ("tokens", "modules"):
        (tmp_path / "b").mkdir()
        again = LoraConfig(task_type="CAUSAL_LM", **options)
        resumes_and_continues(base_folder, tmp_path / "b", again)
    assert trainer.reference.reference.adapter is None, "a new adapter's reference is the base"


UNTRAINED = {
    "alora_invocation_tokens": [263, 270],
    "layer_replication": [[0, 1], [0, 1]],
    "kasa_config": KasaConfig(),
    "arrow_config": ArrowConfig(),
    "monteclora_config": True,
}


@pytest.mark.parametrize("field", LORA_VARIANTS)
def test_variants_that_are_refused(base_folder, tmp_path, field):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS)
    setattr(config, field, UNTRAINED[field])
    with pytest.raises(ValueError, match=rf"LoraConfig has {field}, which cannot be used here"):
        trainer_of(base_folder, tmp_path / "out", config)


def test_a_first_gradient_of_zero_stops_the_run(base_folder, tmp_path, monkeypatch):
    """As activated LoRA, were it not refused: its layers do nothing without the model's forward."""
    monkeypatch.setattr("fastdpo.modeling.peft_types.LORA_VARIANTS", {})
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, alora_invocation_tokens=[70])
    trainer = trainer_of(base_folder, tmp_path / "out", config)
    with pytest.raises(ValueError, match="first update is exactly 0, so nothing would be trained"):
        trainer.train()
    still = trainer_of(base_folder, tmp_path / "out2", config_of("LORA"))
    still.update.loss_function = lambda pairs: pairs.margins.square()
    with pytest.raises(ValueError, match="does not change with the policy"):
        still.train()


# 4-bit weights


def quantized(base_folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=quantization)


def dequantized(model, base_folder):
    dense = AutoModelForCausalLM.from_pretrained(base_folder)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = dense.get_submodule(name).weight
            target.data = weight.to(target.dtype).view_as(target)
    return dense


@pytest.mark.parametrize("kind", [kind for kind, four_bit in TRAINED.items() if four_bit])
def test_on_4bit_weights_they_are_as_on_the_same_weights_whole(base_folder, kind):
    base = quantized(base_folder)
    models = []
    for model in (base, dequantized(base, base_folder)):
        torch.manual_seed(0)
        models.append(add_adapter(model, config_of(kind)).train())
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (1, 24), generator=draw)
    ids[0, :4] = torch.tensor(TOKENS[:4])
    pairs = list(zip(*(model.named_parameters() for model in models), strict=True))
    trained = [(name, p, q) for (name, p), (_, q) in pairs if p.requires_grad]
    with torch.no_grad():
        for _, p, q in trained:
            noise = torch.randn(p.shape, generator=draw) * 0.05
            p.add_(noise)
            q.add_(noise)
    ours, theirs = (model(ids).logits for model in models)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for logits in (ours, theirs):
        logits.log_softmax(-1)[0].gather(1, ids[0, :, None]).sum().backward()
    for name, p, q in trained:
        assert p.grad is not None, name
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", [kind for kind, four_bit in TRAINED.items() if not four_bit])
def test_types_that_4bit_weights_do_not_have_are_refused(kind):
    with pytest.raises(ValueError, match=rf"\({kind}\) cannot be used on 4-bit weights.*--lora"):
        check_peft_type(config_of(kind), four_bit=True)
