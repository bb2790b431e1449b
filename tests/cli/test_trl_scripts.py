"""Scripts written for TRL 1.16 run with nothing but their import changed, to the same numbers.

The script is the one that TRL installs, `scripts/dpo.py`, read from there and run as it stands.
"""

import ast
import json
import sys
from importlib import import_module
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo
from fastdpo import DPOConfig
from tests.tiny_trainer import TOKENIZER, preference_rows, tiny_base, tiny_trainer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOUND = 2e-5  # relative, as in tests/trainer/test_trl_parity.py

QUICK_START = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

dataset = load_dataset({data!r}, split="train")
training_args = DPOConfig(
    output_dir="quick", use_cpu=True, bf16=False, logging_steps=1, max_steps=3, learning_rate=1e-3,
    train_sampling_strategy="sequential", report_to="none", disable_tqdm=True,
)
trainer = DPOTrainer(model={model!r}, args=training_args, train_dataset=dataset)
trainer.train()
"""


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="the scripts are TRL's (pip install fastdpo[dev])")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_base().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(folder)


def conversation(row, side):
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row[side]},
    ]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Conversations with an implicit prompt, as in trl-lib/ultrafeedback_binarized."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 24), ("test", 5)):
        rows = [
            {side: conversation(row, side) for side in ("chosen", "rejected")}
            for row in preference_rows(count, seed=count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Execute a script's text as __main__ in a folder of its own; gives its trainer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def execute(text, package, argv=()):
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        changed = text.replace("from trl import", f"from {package} import")
        made, trainer_class = [], import_module(package).DPOTrainer
        real = trainer_class.__init__

        def remember(self, *args, **kwargs):
            made.append(self)
            real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_class, "__init__", remember)
            exec(compile(changed, f"{package} script", "exec"), {"__name__": "__main__"})
        (trainer,) = made
        assert type(trainer).__module__.startswith(f"{package}.")
        return trainer

    return execute


@pytest.fixture(scope="module")
def script(trl):
    return (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text(encoding="utf-8")


def curve(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same_curve(ours, theirs):
    first, second = curve(ours), curve(theirs)
    assert len(first) == len(second) >= 3
    for name in ("loss", "grad_norm"):
        worst = max(abs(a[name] / b[name] - 1) for a, b in zip(first, second, strict=True))
        print(f"{name} within {worst:.1e} of TRL's")
        assert worst <= BOUND, name
    assert first[-1]["loss"] < 0.69, "nothing was learnt, so nothing was compared"


def test_every_name_that_the_script_imports_is_here(script):
    imported = {
        name.name
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.ImportFrom) and node.module == "trl"
        for name in node.names
    }
    assert len(imported) == 9
    assert imported <= set(fastdpo.__all__)
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="has no attribute 'KTOTrainer'; it has"):
        _ = fastdpo.KTOTrainer


def test_the_quick_start_runs_with_its_import_changed(run, trl, model_folder, data_folder):
    text = QUICK_START.format(model=model_folder, data=data_folder)
    assert_same_curve(run(text, "fastdpo"), run(text, "trl"))


COMMON = (
    "--max_steps", "3", "--use_cpu", "--bf16", "false", "--logging_steps", "1",
    "--train_sampling_strategy", "sequential", "--disable_tqdm", "true", "--output_dir", "out",
    "--no_remove_unused_columns", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2",
)  # fmt: skip


def test_the_script_of_trl_runs_with_its_import_changed(run, script, model_folder, data_folder):
    argv = (*COMMON, "--model_name_or_path", model_folder, "--dataset_name", data_folder)
    ours, theirs = run(script, "fastdpo", argv), run(script, "trl", argv)
    assert_same_curve(ours, theirs)
    metrics = [
        [line for line in trainer.state.log_history if "eval_loss" in line][-1]
        for trainer in (ours, theirs)
    ]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=BOUND)
    for trainer in (ours, theirs):
        assert (Path(trainer.args.output_dir) / "model.safetensors").exists()


def test_the_script_trains_an_adapter_over_4_bits_from_a_yaml_file(
    run, script, model_folder, data_folder, tmp_path
):
    (tmp_path / "run.yaml").write_text(
        "use_peft: true\nload_in_4bit: true\nlora_r: 4\nlora_target_modules: all-linear\n"
        "attn_implementation: flash_attention_2\nprecompute_ref_log_probs: true\nbeta: 0.2\n"
        f"learning_rate: 5.0e-3\ndatasets:\n  - path: {data_folder}/train.jsonl\n"
        "test_split_size: 4\n"
    )
    argv = (*COMMON, "--model_name_or_path", model_folder, "--config", str(tmp_path / "run.yaml"))
    trainer = run(script, "fastdpo", argv)
    assert trainer.user_args.beta == 0.2
    assert trainer.user_args.learning_rate == 1e-3, "the command line overrides the file"
    assert trainer.trains_adapter
    assert trainer.policy.get_base_model().is_loaded_in_4bit
    assert (len(trainer.train_groups), len(trainer.eval_groups)) == (20, 4)
    assert (tmp_path / "fastdpo" / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("place", ["field", "model_init_kwargs"])
def test_revision_and_remote_code_reach_model_and_tokenizer(
    model_folder, tmp_path, monkeypatch, place
):
    requested = []
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        real = kind.from_pretrained

        def from_pretrained(name, real=real, **options):
            requested.append((options["revision"], options["trust_remote_code"]))
            return real(name, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    loading = {"revision": "v2"}
    options = {"trust_remote_code": True} if place == "field" else {}
    if not options:
        loading["trust_remote_code"] = True
    args = DPOConfig(str(tmp_path / "out"), use_cpu=True, model_init_kwargs=loading, **options)
    fastdpo.DPOTrainer(model_folder, args=args, train_dataset=preference_rows(3))
    assert requested == [("v2", True)] * 2


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_model_card_lies_beside_the_result(tmp_path, monkeypatch, tuning):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(
        tiny_base(), tmp_path / "out", tuning=tuning, max_steps=1, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in trainer.state.log_history if "eval_loss" in line]
    for wanted in (
        "# out", "35 preference pairs", "in 1 updates", f"| loss | {line['eval_loss']:.4g} |",
        trainer.reference.reference.description, "| torch |",
    ):  # fmt: skip
        assert wanted in text, wanted
    trainer.create_model_card(model_name="mine", dataset_name="org/pairs", tags="tagged")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# mine" in text
    assert "- org/pairs" in text
    assert "- tagged" in text
