"""Bugs that trainers of this kind had (R numbers: the catalogue), where no room's tests look.

They need no file beside the checkout: the tokenizers are made here, in memory.
"""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdpo_kernels import _torch, linear_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedTokenizerFast

from fastdpo.batching import PromptGroup
from fastdpo.data import prepare_pairs, rows_from
from fastdpo.modeling.adapters import add_adapter, load_adapter, load_second_adapter, lora_config
from fastdpo.modeling.head import get_lm_head
from tests.data.test_tokenize import tokenization
from tests.fused_ops.test_linear_logprobs import inputs, oracle_gradients, row_error
from tests.modeling.test_packed_pairs import SIZES, assert_same, model_of, packed, separate
from tests.tiny_trainer import CONFIG, HELD_OUT, tiny_base, tiny_trainer

BOS, EOS = "<s>", "</s>"


def merging_tokenizer():
    """Bytes, with merges over the places where a prompt may end; BOS is added, EOS is not."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "b"), ("a", "b"), ("Ġ", "Ġ")]
    vocabulary = [*symbols, *map("".join, merges), BOS, EOS]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


texts = st.text(alphabet="ab ", max_size=6)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_one_bos_one_eos_one_prompt_for_both_sides(pad_is_eos):
    """R01 to R04, R06, R09: whatever the texts, where merges cross the boundary too."""
    tokenizer = merging_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = EOS
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    always = {"prompt": "a", "chosen": "c", "rejected": "d"}

    def prepared(rows, max_length):
        return prepare_pairs(
            rows_from([*rows, always], "rows"), tokenizer, tokenization(max_length=max_length)
        )

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(texts, texts, texts, st.booleans(), st.booleans(), st.sampled_from([None, 4, 7]))
    def check(prompt, chosen, rejected, begun, ended, max_length):
        given_prompt, given_chosen = BOS * begun + prompt, chosen + EOS * ended
        row = {"prompt": given_prompt, "chosen": given_chosen, "rejected": rejected}
        pairs = prepared([row], max_length)
        swapped = prepared([row | {"chosen": rejected, "rejected": given_chosen}], max_length)
        assert sum(e.count for e in pairs.report.dropped.values()) + len(pairs) == 2
        for pair, other in zip(pairs, swapped, strict=True):
            if pair.row == 1:
                continue
            assert pair.prompt_ids.tolist() == other.prompt_ids.tolist()
            assert pair.chosen_ids.tolist() == other.rejected_ids.tolist()
            assert pair.rejected_ids.tolist() == other.chosen_ids.tolist()
            assert min(len(ids) for ids in pair.completions) >= 1
            for ids, text in zip(pair.completions, (chosen, rejected), strict=True):
                if max_length is not None:
                    assert len(pair.prompt_ids) + len(ids) <= max_length
                    continue
                whole = [*pair.prompt_ids.tolist(), *ids.tolist()]
                assert whole[0] == bos
                assert whole.count(bos) == whole.count(eos) == 1
                assert ids[-1] == eos
                assert tokenizer.decode(whole) == BOS + prompt + text + EOS
                assert whole == [*tokenizer(prompt + text)["input_ids"], eos]

    check()


def test_pairs_that_differ_in_one_token_and_token_0_are_scored():
    """R13, R16: the first token of a completion counts, and 0 is a token like any other."""
    model = model_of("llama")  # its pad token is 0, which is common here
    same = np.array([0, 7, 0], dtype=np.int32)
    prompt = np.array([9, 0, 0], dtype=np.int32)
    first = [np.concatenate([[token], same]).astype(np.int32) for token in (0, 6)]
    last = [np.concatenate([same, [token]]).astype(np.int32) for token in (0, 6)]
    groups = [PromptGroup(prompt, tuple(first)), PromptGroup(prompt, tuple(last))]
    found = packed(model, groups)
    assert_same(found, separate(model, groups))
    assert all(abs(chosen - rejected) > 1e-3 for chosen, rejected in found[0])


# The head


def test_what_would_never_train_or_be_scored_wrongly_is_refused():
    """R30, R31: an adapter on the head, and factors on the logits that nobody knows."""
    for config in (
        LoraConfig(target_modules=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises(ValueError, match="an adapter lies on lm_head"):
            get_lm_head(get_peft_model(tiny_base(), config))
    for name in ("logit_bias_scale", "my_scale", "head_multiplier"):
        model = tiny_base()
        setattr(model.config, name, 0.5)
        with pytest.raises(ValueError, match=f"{name}=0.5, which may change the logits"):
            get_lm_head(model)
        setattr(model.config, name, 1.0)
        assert get_lm_head(model).logit_scale == 1.0
    with pytest.raises(ValueError, match="no output embeddings"):
        get_lm_head(tiny_base().model)


def test_factors_on_the_logits_are_read():
    """R30: one family multiplies by the field that another divides by."""
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.25))
    granite = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=4.0))
    assert get_lm_head(cohere).logit_scale == get_lm_head(granite).logit_scale == 0.25
    granite.config.model_type = "hyperclovax"
    assert get_lm_head(granite).logit_scale == 4.0


# The kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tiles_do_not_make_the_gradient_worse(monkeypatch, dtype):
    """R36: sums over tiles are kept in fp32, however many there are."""
    states, weight, targets = inputs(24, 32, 1024, dtype, scale=0.3)
    upstream = torch.ones(24)
    _, truth, _, _ = oracle_gradients(states, weight, targets, upstream)
    errors = []
    for columns in (512, 8):
        monkeypatch.setattr(_torch, "TILE_BYTES", 4 * _torch.ROWS_CPU * columns)
        leaf = states.clone().requires_grad_()
        linear_logprobs(leaf, weight, targets, backend="torch").sum().backward()
        errors.append(row_error(leaf.grad, truth))
    assert errors[1] <= 1.5 * errors[0] + 1e-6


def names_of(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def narrow_products(source):
    """Products with a stride whose factor grows with a program's or a tile's number, in 32 bits."""
    found = set()
    for kernel in ast.parse(source).body:
        if not isinstance(kernel, ast.FunctionDef):
            continue
        narrow = set()
        for node in ast.walk(kernel):
            if isinstance(node, ast.For):
                narrow |= names_of(node.target)
        for node in sorted(
            (n for n in ast.walk(kernel) if isinstance(n, ast.Assign)), key=lambda n: n.lineno
        ):
            value = ast.unparse(node.value)
            grows = "program_id" in value or names_of(node.value) & narrow
            if grows and "tl.int64" not in value:
                narrow |= set().union(*map(names_of, node.targets))
        for node in ast.walk(kernel):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                by_stride = ast.unparse(node.right).endswith("_stride")
                widened = any(word in ast.unparse(node) for word in (".to(", "tl.cast("))
                if by_stride and names_of(node.left) & narrow and not widened:
                    found.add(f"{kernel.name}: {ast.unparse(node)}")
    return found


def test_offsets_of_the_kernels_are_64_bit():
    """R38: a row's or a column's number is widened before it is multiplied by a stride.

    N x V passes 2^31 in a run of any size; a wrapped offset reads finite, wrong numbers.
    """
    bounded = {"gradient_kernel: v[:, None] * weight_stride"}  # v stays below a tile's width
    for path in Path(_torch.__file__).parent.glob("_triton*.py"):
        assert narrow_products(path.read_text(encoding="utf-8")) <= bounded, path.name
    source = Path(_torch.__file__).with_name("_triton.py").read_text(encoding="utf-8")
    for needed in ("row_start = ", "column_start = "):
        head, tail = source.split(needed, 1)
        narrowed = head + needed + tail.replace(".to(tl.int64)", "", 1)
        assert narrow_products(narrowed), f"not noticed: {needed}"


# Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with a lively policy, the base it started from, and its evaluation after it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.setenv("FASTDPO_CACHE", str(folder / "cache"))
        base = tiny_base()
        trainer = tiny_trainer(
            copy.deepcopy(base), folder / "out", learning_rate=2e-2, dropout=0.5, beta=0.3
        )
        trainer.model.base_model.model.model.layers[0].eval()  # a user may freeze a part so
        before = {name: module.training for name, module in trainer.model.named_modules()}
        tokens = trainer.train_groups.content_hash
        trainer.train()
        trainer.model.train()
        trainer.model.base_model.model.model.layers[0].eval()
        evaluated = trainer.evaluate()
        after = {name: module.training for name, module in trainer.model.named_modules()}
        assert after == before, "R75: an evaluation leaves another mode behind"
        assert type(trainer.train_groups)(trainer.train_groups.pairs).content_hash == tokens
        trainer.save_model()
        return trainer, base, evaluated, folder


def brute_force(model, pairs):
    """Per pair and side: summed log-prob, mean entropy, mean logit, share of top tokens."""
    model.eval()
    rows = []
    for pair in pairs:
        for completion in pair.completions:
            ids = torch.tensor([[*pair.prompt_ids.tolist(), *completion.tolist()]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1].double()
            logps, targets = logits.log_softmax(-1), torch.tensor(completion.tolist())
            rows.append(
                (
                    logps.gather(1, targets[:, None]).sum().item(),
                    -(logps.exp() * logps).sum(-1),
                    logits.mean(-1),
                    (logits.argmax(-1) == targets).double(),
                )
            )
    return rows


def test_each_figure_is_what_its_name_says(trained):
    """R25, and R15: against a plain forward of every sequence alone; the sides are not swapped."""
    trainer, base, evaluated, _ = trained
    pairs = trainer.eval_groups.pairs
    assert len(pairs) == len(HELD_OUT)
    policy = brute_force(trainer.model, pairs)
    ref = np.array([row[0] for row in brute_force(base, pairs)]).reshape(-1, 2)
    logps = np.array([row[0] for row in policy]).reshape(-1, 2)
    rewards = 0.3 * (logps - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    assert abs(margins).max() > 0.1

    def mean(column, rows):
        return torch.cat([row[column] for row in rows]).mean().item()

    wanted = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "lengths/chosen": np.mean([len(pair.chosen_ids) for pair in pairs]),
        "lengths/rejected": np.mean([len(pair.rejected_ids) for pair in pairs]),
        "entropy": mean(1, policy),
        "logits/chosen": mean(2, policy[::2]),
        "logits/rejected": mean(2, policy[1::2]),
        "mean_token_accuracy": mean(3, policy[::2]),
    }
    for name, value in wanted.items():
        assert evaluated[f"eval_{name}"] == pytest.approx(value, rel=2e-5, abs=2e-5), name


def test_an_adapters_folder_holds_its_own_matrices_only(trained):
    """R60: no copy of the embeddings rides along."""
    saved = load_file(trained[3] / "out" / "adapter_model.safetensors")
    assert saved
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert len(saved) == 2 * 7 * CONFIG.num_hidden_layers


def whole(tensors):
    return tensors


def renamed(tensors):
    return {name.replace("layers.1.", "blocks.1."): t for name, t in tensors.items()}


def lacking(tensors):
    return dict(list(tensors.items())[:-1])


def surplus(tensors):
    name = next(iter(tensors))
    return tensors | {name.replace("layers.0.", "layers.7."): tensors[name].clone()}


def narrower(tensors):
    return {name: t[:, :-1].clone() for name, t in tensors.items()}


@pytest.mark.parametrize("change", [whole, renamed, lacking, surplus, narrower])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change):
    """R61: PEFT leaves a matrix that it does not find as it was drawn, with a warning."""
    base = tiny_base()
    base.config._name_or_path = base.name_or_path = "a base"
    made = add_adapter(base, lora_config(4, 8, 0.0, None))
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(change(weights), tmp_path / "adapter_model.safetensors")
    policy = add_adapter(tiny_base(), lora_config(4, 8, 0.0, None))
    if change is whole:
        loaded = load_adapter(tiny_base(), str(tmp_path), trainable=True)
        assert sum(p.requires_grad for p in loaded.parameters()) == len(weights)
        load_second_adapter(policy, str(tmp_path), "second")
        return
    with pytest.raises(ValueError, match="does not fit this base"):
        load_adapter(tiny_base(), str(tmp_path))
    with pytest.raises(ValueError, match="does not fit this base"):
        load_second_adapter(policy, str(tmp_path), "second")


def test_the_first_margin_is_0_on_a_bf16_base(tmp_path, monkeypatch):
    """R47, R48: the pass that fills the store and the update run in one precision and shape."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    model = tiny_base().to(torch.bfloat16)
    trainer = tiny_trainer(model, tmp_path / "out", max_steps=1, micro_batch_tokens=256)
    trainer.train()
    assert trainer.first_update_margin == 0.0
