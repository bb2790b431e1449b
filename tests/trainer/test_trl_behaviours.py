"""What users of TRL's DPOTrainer rely on: what is trained, what can be read, what is refused.

Each test names a behavior of TRL 1.16; its parameters are the cases that TRL's own tests tell
apart. The kinds:

    architectures   eight families of decoders, remote code, float16, 4 bits
    data            standard and conversational rows, prompts explicit or implicit, tool calls,
                    variables of the template, streams, rows that max_length drops
    losses          each of TRL's by name, sums, WPO, LD-DPO, f-divergences
    references      none, given, following the policy, an adapter switched off
    adapters        by config, brought, on experts' parameters, with checkpointing
    evaluation      sets of every kind at the start and in evaluate(), metrics of the user's own
    attributes      train_dataset, eval_dataset, ref_model, aux_loss_enabled, model_tags

What is different on purpose is tested as what it is here, at the end, and listed in
docs/coming-from-trl.md: streams beside a stored reference, no train set, a dict of train sets, a
stop at NaN, the tag "trl".
"""

import copy
import json

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cohere2Config,
    Glm4MoeConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    NemotronHConfig,
    Olmo3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from fastdpo import DPOConfig, DPOTrainer
from tests.tiny_trainer import TOKENIZER, preference_rows

SIZES = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT_OSS = GptOssConfig(
    **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9,
    layer_types=["sliding_attention"],
)  # fmt: skip
ARCHITECTURES = {
    "cohere2": Cohere2Config(**SIZES, sliding_window=9, layer_types=["sliding_attention"]),
    "glm4-moe": Glm4MoeConfig(
        **SIZES, **EXPERTS, head_dim=16, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=0, n_shared_experts=1,
    ),
    "gpt-oss": GPT_OSS,
    "lfm2": Lfm2Config(
        **SIZES | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"],
        conv_L_cache=3, block_ff_dim=48, block_auto_adjust_ff_dim=False,
    ),
    "nemotron-h": NemotronHConfig(
        **SIZES | {"num_hidden_layers": 2}, layers_block_type=["mamba", "attention"],
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=16,
    ),
    "olmo3": Olmo3Config(**SIZES, sliding_window=9, layer_types=["sliding_attention"]),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, num_experts=4),
}  # fmt: skip
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role | upper if role_capital else m.role }}|>"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS, HELD_OUT = preference_rows(6), preference_rows(3, seed=1)
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SETS = (
    "dataset", "iterable_dataset", "dataset_dict", "iterable_dataset_dict", "dict_of_dataset",
    "dict_of_iterable_dataset",
)  # fmt: skip


def new_model(config=ARCHITECTURES["qwen2"], **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model that is named by its folder, as TRL's tests name hub ids."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    new_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def make(model_folder, tmp_path, monkeypatch):
    """Build a trainer with TRL's defaults but for small updates at a high learning rate."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def build(model=None, *, train_dataset=None, processing_class=None, **given):
        names = ("eval_dataset", "ref_model", "peft_config", "compute_metrics")
        arguments = {name: given.pop(name, None) for name in names}
        options = {
            "per_device_train_batch_size": 3, "num_train_epochs": 1, "learning_rate": 0.02,
            "warmup_steps": 0, "use_cpu": True, "bf16": False, "report_to": "none",
            "disable_tqdm": True, "save_strategy": "no",
        } | given  # fmt: skip
        if processing_class is None and not isinstance(model, str | None):
            processing_class = AutoTokenizer.from_pretrained(model_folder)
        return DPOTrainer(
            model_folder if model is None else model,
            args=DPOConfig(str(tmp_path / "out"), **options),
            train_dataset=Dataset.from_list(ROWS) if train_dataset is None else train_dataset,
            processing_class=processing_class,
            **arguments,
        )

    return build


def parameters(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def train(trainer, frozen=lambda name: False):
    """Train; every parameter moves but those that are `frozen`, and the loss is in the last log."""
    before = parameters(trainer)
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["train_loss"] > 0 or "hinge" in trainer.user_args.loss_type
    assert last["mean_token_accuracy"] is not None
    after = parameters(trainer)
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == frozen(name), name
    return last


def conversation(row, side):
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row[side]},
    ]


def in_form(name, rows=ROWS):
    both = ("chosen", "rejected")
    forms = {
        "standard": lambda row: row,
        "standard_implicit_prompt": lambda row: {s: row["prompt"] + row[s] for s in both},
        "conversational": lambda row: {
            "prompt": conversation(row, "chosen")[:1],
            **{side: conversation(row, side)[1:] for side in both},
        },
        "conversational_implicit_prompt": lambda row: {s: conversation(row, s) for s in both},
    }
    return Dataset.from_list([forms[name](row) for row in rows])


def in_set(kind, rows=HELD_OUT):
    """Evaluation rows as a data set of each kind that TRL takes."""
    part = Dataset.from_list(rows)
    part = part.to_iterable_dataset() if "iterable" in kind else part
    if kind.endswith("dataset_dict"):
        return (IterableDatasetDict if "iterable" in kind else DatasetDict)(one=part, two=part)
    return {"one": part, "two": part} if kind.startswith("dict_of") else part


# Architectures


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_weight_of_the_family_trains(make, family):
    eager = {"attn_implementation": "eager"} if family == "gpt-oss" else {}
    trainer = make(new_model(ARCHITECTURES[family], **eager))
    last = train(trainer)
    assert trainer.aux_loss_enabled == (family in ("gpt-oss", "qwen3-moe"))
    assert ("aux_loss" in last) == trainer.aux_loss_enabled


def test_a_model_is_taken_as_an_object(make):
    model = new_model()
    trainer = make(model)
    assert trainer.model is model
    train(trainer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_init_kwargs_choose_the_dtype(make, dtype):
    trainer = make(model_init_kwargs={"dtype": dtype})
    train(trainer)
    assert {each.dtype for each in trainer.model.parameters()} == {dtype}


def test_code_of_the_repository_runs_only_when_trusted(make, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "remote"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    (folder / "remote.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
        "class RemoteConfig(Qwen2Config):\n    model_type = 'remote-tiny'\n\n\n"
        "class RemoteForCausalLM(Qwen2ForCausalLM):\n    config_class = RemoteConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "RemoteConfig", "AutoModelForCausalLM": "RemoteForCausalLM"}
    config["model_type"] = "remote-tiny"
    config["auto_map"] = {auto: f"remote.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="custom code"):
        make(str(folder))
    trainer = make(str(folder), trust_remote_code=True)
    assert type(trainer.model).__name__ == "RemoteForCausalLM"


def test_gradient_checkpointing_of_all_weights(make):
    train(make(gradient_checkpointing=True))


def test_an_adapter_on_four_bits(make, model_folder):
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, quantization_config=quantized
    )
    train(make(model, peft_config=LoraConfig()), frozen=lambda name: "lora" not in name)


# Data


@pytest.mark.parametrize(
    "form",
    [
        "standard",
        "conversational",
        "standard_implicit_prompt",
        "conversational_implicit_prompt",
    ],
)
def test_rows_of_every_form_train(make, form):
    train(make(train_dataset=in_form(form)))


def test_a_channel_beside_the_content_trains(make, tokenizer):
    """As gpt-oss's harmony has it: an answer of two messages of one role."""
    thought = [{"role": "assistant", "thinking": "Blue?", "content": "So: blue."}]
    rows = [
        {
            "prompt": conversation(row, "chosen")[:1],
            "chosen": [thought[0] | {"content": row["chosen"]}],
            "rejected": [thought[0] | {"content": row["rejected"]}],
        }
        for row in ROWS
    ]
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}")
    trainer = make(train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert "Blue?" in tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
    train(trainer)


def test_a_stream_trains_for_max_steps(make):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    trainer = make(train_dataset=stream, max_steps=2)
    train(trainer)
    assert trainer.state.global_step == 2


def test_tool_calls_train(make):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "Of a city."}}
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "tools": json.dumps([tool]),
        }
        for row in ROWS
    ]
    trainer = make(train_dataset=rows, max_length=512)
    prompt = trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"])
    assert "Of a city." in prompt
    train(trainer)


def test_variables_of_the_template_are_seen_in_the_prepared_ids(make, tokenizer):
    dataset = in_form("conversational")
    kwargs = [{"role_capital": bool(index % 2)} for index in range(len(dataset))]
    trainer = make(
        train_dataset=dataset.add_column("chat_template_kwargs", kwargs),
        processing_class=tokenizer,
    )
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    for index, role in ((0, "<|user|>"), (1, "<|USER|>")):
        ids = tokenizer(role, add_special_tokens=False)["input_ids"]
        assert trainer.train_dataset[index]["prompt_ids"][: len(ids)] == ids
    train(trainer)


def test_rows_whose_prompt_fills_max_length_are_dropped_with_keep_start(make):
    rows = [
        {"prompt": "Hi", "chosen": " you", "rejected": " bye"},
        {"prompt": "A prompt that is longer than six bytes", "chosen": " yes", "rejected": " no"},
    ]
    trainer = make(
        train_dataset=Dataset.from_list(rows), max_length=6, truncation_mode="keep_start"
    )
    assert len(trainer.train_dataset) == 1
    assert trainer.train_dataset[0]["prompt_ids"] == trainer.processing_class("Hi")["input_ids"]


# Prepared rows


@pytest.mark.parametrize("kind", ["dataset", "iterable_dataset"])
def test_prepared_training_rows_are_mappings(make, kind):
    dataset = in_set(kind, ROWS)
    trainer = make(train_dataset=dataset, max_steps=1)
    row = next(iter(trainer.train_dataset))
    assert "prompt_ids" in row
    assert trainer.train_dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    decode = trainer.processing_class.decode
    text = decode(row["prompt_ids"]) + decode(dict(row)["rejected_ids"])
    assert text == ROWS[0]["prompt"] + ROWS[0]["rejected"] + "</s>"
    assert trainer.train_dataset["chosen_ids"][1] == trainer.train_dataset[1]["chosen_ids"]
    with pytest.raises(KeyError, match="a prepared pair has prompt_ids"):
        row["input_ids"]
    trainer.train()
    known = [row for row in trainer.train_dataset if "ref_chosen_logps" in row]
    assert len(known) == 3, "of the one update"
    assert all(row["ref_chosen_logps"] < 0 for row in known)


@pytest.mark.parametrize("kind", [*SETS, "none"])
def test_evaluation_sets_of_every_kind_are_prepared(make, kind):
    trainer = make(eval_dataset=None if kind == "none" else in_set(kind))
    found = trainer.eval_dataset
    if kind == "none":
        assert found is None
    elif isinstance(found, dict):
        assert set(found) == {"one", "two"}
        assert all("prompt_ids" in next(iter(part)) for part in found.values())
    else:
        assert "prompt_ids" in next(iter(found))
    assert isinstance(found, dict) == ("dict" in kind)


# Losses


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_and_evaluates(make, loss_type):
    trainer = make(
        loss_type=loss_type, label_smoothing=1e-3 if loss_type == "exo_pair" else 0.0,
        eval_dataset=in_set("dataset"), eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    train(trainer)
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_a_sum_of_losses_trains(make):
    train(make(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]))


@pytest.mark.parametrize("options", [{"use_weighting": True}, {"ld_alpha": 0.5}], ids=["wpo", "ld"])
def test_weighted_tokens_train(make, options):
    train(make(**options))


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
)
def test_f_divergences_train(make, divergence):
    train(make(f_divergence_type=divergence))


# References


def test_a_given_reference_stays_as_it_is(make):
    reference = new_model()
    before = {name: each.detach().clone() for name, each in reference.named_parameters()}
    trainer = make(ref_model=reference)
    assert trainer.ref_model is reference
    train(trainer)
    for name, weight in before.items():
        assert torch.equal(weight, trainer.ref_model.get_parameter(name)), name


def test_a_reference_that_follows_moves(make):
    trainer = make(sync_ref_model=True, ref_model_sync_steps=1)
    before = {n: each.detach().clone() for n, each in trainer.ref_model.named_parameters()}
    train(trainer)
    for name, weight in before.items():
        assert not torch.equal(weight, trainer.ref_model.get_parameter(name)), name


# Adapters


def is_base(name):
    return "lora_" not in name


@pytest.mark.parametrize("brought", [False, True], ids=["peft_config", "PeftModel"])
def test_of_an_adapter_the_base_stays(make, model_folder, brought):
    config = LoraConfig(task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = (
        make(get_peft_model(model, config), learning_rate=0.5)
        if brought
        else make(peft_config=config, learning_rate=0.5)
    )
    assert trainer.ref_model is None
    train(trainer, frozen=is_base)


def test_an_adapter_with_checkpointing(make):
    train(make(peft_config=LoraConfig(), gradient_checkpointing=True), frozen=is_base)


@pytest.mark.parametrize("brought", [False, True], ids=["peft_config", "PeftModel"])
def test_an_adapter_on_parameters_of_experts(make, brought):
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = LoraConfig(target_parameters=names)
    model = new_model(GPT_OSS, attn_implementation="eager")
    trainer = make(get_peft_model(model, config)) if brought else make(model, peft_config=config)
    assert "ref" not in trainer.model.peft_config
    train(trainer, frozen=is_base)


# Evaluation


def test_evaluation_while_training(make):
    trainer = make(eval_dataset=in_set("dataset"), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["eval_loss"] == pytest.approx(0.69, abs=0.3)


def test_evaluation_of_several_sets_while_training(make):
    sets = in_set("dict_of_dataset")
    trainer = make(eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert "eval_one_loss" in trainer.state.log_history[-3]
    assert "eval_two_loss" in trainer.state.log_history[-2]


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precompute"])
@pytest.mark.parametrize("kind", SETS)
def test_evaluate_takes_raw_sets_of_every_kind(make, kind, precompute):
    """Streams with precompute_ref_log_probs too, where TRL refuses them."""
    metrics = make(precompute_ref_log_probs=precompute).evaluate(eval_dataset=in_set(kind))
    names = ("eval_one_loss", "eval_two_loss") if "dict" in kind else ("eval_loss",)
    assert all(name in metrics for name in names)


def test_a_set_that_comes_after_the_reference_is_gone_is_refused(make):
    trainer = make(max_steps=1, precompute_ref_log_probs=True)
    assert "eval_loss" in trainer.evaluate(eval_dataset=in_set("dataset"))
    trainer.train()
    late = Dataset.from_list(preference_rows(2, seed=9))
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed"):
        trainer.evaluate(eval_dataset=late)


@pytest.mark.parametrize("kind", ["dataset", "dataset_dict", "dict_of_dataset"])
def test_a_set_of_the_start_is_evaluated_after_training(make, kind):
    trainer = make(max_steps=1, precompute_ref_log_probs=True, eval_dataset=in_set(kind))
    trainer.train()
    metrics = trainer.evaluate()
    names = ("eval_one_loss", "eval_two_loss") if "dict" in kind else ("eval_loss",)
    assert all(name in metrics for name in names)


def test_compute_metrics_is_given_the_log_probs_of_both_sides(make):
    seen = []

    def compute(prediction):
        logps, ref_logps = prediction.predictions
        seen.append((logps, ref_logps, prediction.label_ids))
        logratios = logps - ref_logps
        return {"mine": 0.123, "margin": float((logratios[:, 0] - logratios[:, 1]).mean())}

    trainer = make(
        eval_dataset=in_set("dataset"), eval_strategy="steps", eval_steps=2,
        compute_metrics=compute, beta=0.5,
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.state.log_history[-2]
    assert evaluated["eval_mine"] == 0.123
    assert evaluated["eval_rewards/margins"] == pytest.approx(0.5 * evaluated["eval_margin"])
    logps, ref_logps, labels = seen[-1]
    assert logps.shape == ref_logps.shape == (3, 2)
    assert labels.tolist() == [0, 0, 0]
    assert logps[:, 0].mean() == pytest.approx(evaluated["eval_logps/chosen"])


# Attributes


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "adapter"])
def test_the_model_carries_its_tag(make, peft_config):
    """The tag of the method; that of the library is fastdpo, where TRL's is trl."""
    tags = make(peft_config=peft_config).model.model_tags
    assert {"dpo", "fastdpo"} <= set(tags)
    assert "trl" not in tags


# Different on purpose


@pytest.mark.parametrize("place", ["train", "iterable_dataset", *SETS[3::2]])
def test_streams_and_a_stored_reference_go_together(make, place):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    sets = {"train_dataset": stream} if place == "train" else {"eval_dataset": in_set(place)}
    trainer = make(max_steps=1, precompute_ref_log_probs=True, **sets)
    trainer.train()
    known = [row for row in trainer.train_dataset if "ref_chosen_logps" in row]
    assert len(known) == 3, "of the one update"
    assert all(row["ref_chosen_logps"] < 0 for row in known)


def test_without_a_train_set_it_evaluates(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    args = DPOConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = DPOTrainer(model_folder, args=args, eval_dataset=in_set("dataset"))
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="no train_dataset"):
        trainer.train()


def test_a_dict_of_train_sets_is_refused(make):
    with pytest.raises(ValueError, match="pass one of them"):
        make(train_dataset=DatasetDict(train=Dataset.from_list(ROWS)))


def test_a_loss_that_is_not_finite_stops_the_run(make):
    with pytest.raises(FloatingPointError, match="not finite"):
        make(new_model(LlamaConfig(**SIZES)), learning_rate=1e30, num_train_epochs=3).train()
