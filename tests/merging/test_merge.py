"""`python -m fastdpo.merge`: equal to PEFT's merge, in bounded memory, ready for plain loaders."""

import ctypes
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from fastdpo import merge
from fastdpo.cli.parser import command
from fastdpo.demo.build import make_tokenizer
from fastdpo.merging import find_base, plan_merge, read_adapter, write_folder
from fastdpo.merging.tensor_files import tensors_of
from fastdpo.system import files
from tests.tiny_trainer import plain_logps

TOKENIZER = make_tokenizer()
LINEAR = ["q_proj", "v_proj", "down_proj"]
ROWS = [
    {"prompt": f"ask {i} ", "chosen": "kind " * (i + 1), "rejected": "gruff " * (3 - i % 3)}
    for i in range(6)
]


def llama(**changes):
    return LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, **changes,
    )  # fmt: skip


def gpt2():
    return GPT2Config(vocab_size=len(TOKENIZER), n_embd=64, n_layer=2, n_head=4, n_positions=256)


def make(config, peft_config, base="base", adapter="adapter", *, dtype=torch.float32, shards=True):
    """A base with its tokenizer and an adapter of random weights; returns the adapted model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(base, max_shard_size="60KB" if shards else "5GB")
    TOKENIZER.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = get_peft_model(model, peft_config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data *= torch.rand_like(parameter) + 0.5
    adapted.save_pretrained(adapter)
    return adapted.eval()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


KINDS = {
    "plain": (llama(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "rslora": (llama(), LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=LINEAR)),
    "patterns": (
        llama(),
        LoraConfig(
            r=4, lora_alpha=8, target_modules=LINEAR, rank_pattern={"layers.0.*.q_proj": 2},
            alpha_pattern={"down_proj": 32, "model.layers.1.self_attn.v_proj": 3},
        ),
    ),
    "dora": (llama(), LoraConfig(r=4, use_dora=True, target_modules=LINEAR)),
    "bias": (
        llama(attention_bias=True),
        LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "v_proj"]),
    ),
    "bias of the base": (
        llama(attention_bias=True), LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"])
    ),
    "whole head": (
        llama(), LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"])
    ),
    "embedding and head": (
        llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    ),
    "transposed": (gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_proj"])),
    "transposed, dora": (gpt2(), LoraConfig(r=4, use_dora=True, target_modules=["c_attn"])),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pefts_merge(workplace, capsys, kind):
    config, peft_config = KINDS[kind]
    adapted = make(config, peft_config)
    merge.main(["--adapter", "adapter"])
    assert "lies in merged" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("merged")
    expected = adapted.merge_and_unload().state_dict()
    base = AutoModelForCausalLM.from_pretrained("base").state_dict()
    assert merged.state_dict().keys() == expected.keys()
    changed = 0
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        changed += not torch.equal(expected[name], base[name])
    assert changed >= 2


TIED = {
    "whole head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "low-rank embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "low-rank head": {"target_modules": ["lm_head"]},
    "whole, kept tied": {
        "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
        "target_modules": ["q_proj"],
    },
    "low-rank, kept tied": {
        "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True
    },
    "neither": {"target_modules": ["q_proj"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_base_gives_what_the_adapter_gave(workplace, kind, stored):
    """PEFT 0.21's own merge moves both where one was trained: the unmerged model is the measure."""
    config = llama()
    config.tie_word_embeddings = True
    make(config, LoraConfig(r=4, **TIED[kind]), shards=False)
    if stored == "twice":
        weights = load_file("base/model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, "base/model.safetensors", {"format": "pt"})
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    merge.main(["--adapter", "adapter"])
    merged = AutoModelForCausalLM.from_pretrained("merged")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = adapted.eval()(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    stays = kind == "neither" or "kept" in kind
    assert merged.config.tie_word_embeddings is stays
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) is stays


def test_bf16_shards_keep_their_names_and_all_that_is_not_trained(workplace):
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]), dtype=torch.bfloat16)
    shards = sorted(path.name for path in Path("base").glob("*.safetensors"))
    assert len(shards) > 2
    merge.main(["--adapter", "adapter"])
    for shard in shards:
        before, after = load_file(f"base/{shard}"), load_file(f"merged/{shard}")
        assert list(before) == list(after)
        for name in before:
            assert torch.equal(before[name], after[name]) is ("q_proj" not in name), name
    with safe_open(f"merged/{shards[0]}", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = "model.safetensors.index.json"
    before, after = (json.loads(Path(f, index).read_text()) for f in ("base", "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    config = json.loads(Path("merged/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained("merged")("ask").input_ids == TOKENIZER("ask").input_ids


def test_the_adapters_chat_template_wins(workplace):
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    for folder, template in (("base", "old"), ("adapter", "new")):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    Path("base/tokenizer.model").write_bytes(b"for llama.cpp")
    merge.main(["--adapter", "adapter"])
    assert AutoTokenizer.from_pretrained("merged").chat_template == "new"
    assert Path("merged/tokenizer.model").read_bytes() == b"for llama.cpp"


@pytest.mark.parametrize("onto", ["bf16", "dequantized"])
def test_the_report_is_true(workplace, capsys, onto):
    """Merged and reloaded in plain transformers, the log-probs are those of the report."""
    make(llama(), LoraConfig(r=4, target_modules="all-linear"), dtype=torch.bfloat16)
    argv = ["--adapter", "adapter", "--qlora", "--dataset", "pairs.jsonl", "--report_pairs", "4"]
    merge.main([*argv, "--onto", onto])
    said = capsys.readouterr().out
    assert f"merged, {onto} stochastic (written)" in said
    assert ("--onto dequantized --rounding stochastic --overwrite" in said) is (onto == "bf16")
    assert ("is the change of base" in said) is (onto == "bf16")
    onto += " stochastic"
    report = json.loads(Path("merged/merge.json").read_text())["report"]
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    expected = [plain_logps(merged, row, TOKENIZER) for row in ROWS[:4]]
    np.testing.assert_allclose(report["merged"][onto], expected, atol=1e-4)
    assert report["in_4bit"]
    moved = np.abs(np.subtract(report["merged"][onto], report["adapter"]))
    assert report["shifts"][onto]["completion_worst"] == pytest.approx(moved.max())
    assert report["shifts"][onto]["completion_mean"] == pytest.approx(moved.mean())
    margins = np.abs(np.diff(np.subtract(report["merged"][onto], report["adapter"])))
    assert report["shifts"][onto]["margin_worst"] == pytest.approx(margins.max())
    shifts = report["shifts"]
    merged_onto = {way: shift["token_mean"] for way, shift in shifts.items()}
    assert merged_onto["dequantized stochastic"] < 0.3 * merged_onto["bf16 stochastic"]


def test_dequantized_is_what_the_adapter_was_trained_on(workplace):
    """In fp32, where the merge itself rounds nothing, nothing moves."""
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    argv = ["--adapter", "adapter", "--qlora", "--dataset", "pairs.jsonl"]
    merge.main([*argv, "--onto", "dequantized"])
    shifts = json.loads(Path("merged/merge.json").read_text())["report"]["shifts"]
    assert shifts["dequantized stochastic"]["token_worst"] < 2e-5
    assert shifts["bf16 stochastic"]["token_worst"] > 1e-2
    merge.main([*argv, "--output_dir", "other"])
    again = json.loads(Path("other/merge.json").read_text())["report"]["shifts"]
    for kind, shift in shifts.items():
        assert again[kind] == pytest.approx(shift, rel=0.05, abs=1e-5)


def peak_kib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.fixture
def memory_goes_back():
    """What is freed goes back to the system at once, whatever was freed before this test."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs glibc's malloc and Linux's /proc")
    mmap_threshold = -3
    libc.mallopt(mmap_threshold, 2**16)
    libc.malloc_trim(0)
    yield
    libc.mallopt(mmap_threshold, 2**25)


def test_memory_is_bounded_by_one_file(workplace, memory_goes_back):
    config = llama()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 20
    Path("base").mkdir()
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained("base", max_shard_size="6MB")
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).save_pretrained("adapter")
    sizes = [path.stat().st_size for path in Path("base").glob("*.safetensors")]
    largest = max(p.numel() for p in model.parameters()) * 4  # in fp32
    del model
    gc.collect()  # what is freed meanwhile would hide what is taken
    plan = plan_merge(
        find_base("base"),
        read_adapter(Path("adapter")),
        base_precision="bf16",
        quantized_from=torch.float32,
    )
    grown = float("inf")
    for attempt in range(2):  # pages of this process that the system takes and gives back count too
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = peak_kib()
        write_folder(plan, Path(f"merged-{attempt}"))
        grown = min(grown, (peak_kib() - before) * 1024)
    # A file's new tensors, those that it is made from (mapped), and one step of the arithmetic
    # with the largest tensor, in fp32.
    bound = 2 * max(sizes) + 6 * largest + 2**24
    assert grown < bound < sum(sizes) / 2, f"{grown / 2**20:.1f} MiB"


def test_only_an_earlier_merge_is_ever_replaced(workplace):
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    (workplace / "full").mkdir()
    (workplace / "full" / "thesis.txt").write_text("years")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="not an earlier merge"):
            merge.main(["--adapter", "adapter", "--output_dir", "full", *extra])
        for own in ("base", "adapter"):
            with pytest.raises(ValueError, match=f"is the folder of the {own}"):
                merge.main(["--adapter", "adapter", "--output_dir", own, *extra])
    merge.main(["--adapter", "adapter"])
    with pytest.raises(ValueError, match="--overwrite"):
        merge.main(["--adapter", "adapter"])
    (workplace / "merged" / "notes.txt").write_text("mine")
    first = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    merge.main(["--adapter", "adapter", "--onto", "dequantized", "--overwrite"])
    second = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert (workplace / "merged" / "notes.txt").read_text() == "mine"
    assert not list(Path("merged").glob(f"{files.TEMPORARY_MARK}*"))


def test_a_killed_merge_is_no_model_and_is_done_again(workplace, monkeypatch):
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    replace, done = files.replace, []

    def fail_at_the_third(source, target):
        done.append(target)
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files, "replace", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        merge.main(["--adapter", "adapter"])
    assert not Path("merged/config.json").exists()
    monkeypatch.setattr(files, "replace", replace)
    merge.main(["--adapter", "adapter"])
    assert AutoModelForCausalLM.from_pretrained("merged").num_parameters() > 0


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A base and an adapter that fit each other, in a folder to copy."""
    folder = tmp_path_factory.mktemp("good")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    make(llama(), config, folder / "base", folder / "adapter", shards=False)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_short(folder):
    weights = folder / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def rename_tensors(folder):
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("layers", "blocks"): v for k, v in load_file(weights).items()}, weights)


def narrow(folder):
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file(
        {k: v[:, :32].contiguous() if "lora_A" in k else v for k, v in load_file(weights).items()},
        weights,
    )


def without_b(folder):
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "lora_B" not in k}, weights)


def config_of(name, **changes):
    file = "adapter_config.json" if name == "adapter" else "config.json"
    return lambda folder: edit_json(folder / name / file, **changes)


BAD = {
    "no adapter named": (None, [], "--adapter is missing"),
    "no folder": (None, ["--adapter", "nowhere"], "holds no adapter"),
    "not an adapter": (None, ["--adapter", "base"], "holds no adapter"),
    "no base": (None, ["--model", "./nowhere"], "./nowhere"),
    "other base": (narrow, [], "pass the model that the adapter was trained on"),
    "other names": (rename_tensors, [], "no such module"),
    "half": (without_b, [], "has no lora_B"),
    "cut short": (cut_short, [], "not a whole safetensors file"),
    "quantized": (config_of("base", quantization_config={"quant_method": "x"}), [], "quantized"),
    "other method": (config_of("adapter", peft_type="IA3"), [], "of the type IA3"),
    "pissa": (config_of("adapter", init_lora_weights="pissa"), [], "init_lora_weights"),
    "replicated": (config_of("adapter", layer_replication=[[0, 2]]), [], "layer_replication"),
    "later PEFT": (config_of("adapter", use_marvel=True), [], "use_marvel"),
    "trained tokens": (config_of("adapter", trainable_token_indices=[1]), [], "trainable_token"),
    "training option": (None, ["--lora_r", "8"], "--lora_r changes nothing"),
    "onto": (None, ["--onto", "gguf"], "onto"),
    "data": (None, ["--dataset", "none.jsonl"], "there is no file none.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(good, workplace, monkeypatch, capsys, case):
    spoil, argv, message = BAD[case]
    shutil.copytree(good, workplace, dirs_exist_ok=True)
    edit_json(workplace / "adapter" / "adapter_config.json", base_model_name_or_path="base")
    if spoil is not None:
        spoil(workplace)
    if case != "no adapter named" and "--adapter" not in argv:
        argv = ["--adapter", "adapter", *argv]
    monkeypatch.setattr("sys.argv", ["merge", *argv])
    try:
        code = command(merge.main)
    except SystemExit as stop:
        code = stop.code
    complaint = capsys.readouterr().err
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint
    assert not Path("merged/config.json").exists()


def test_tensor_files_are_read_as_safetensors_does(workplace):
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }  # fmt: skip
    save_file(tensors, "some.safetensors")
    found = tensors_of(Path("some.safetensors"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read(), tensor)
