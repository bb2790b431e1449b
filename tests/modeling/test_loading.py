"""Models from files: dtypes, 4-bit checkpoints, what is refused, and how little memory it takes."""

import ctypes
import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from fastdpo.batching import pack_update
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import get_lm_head
from fastdpo.modeling.loading import ModelError, load_model, load_tokenizer, resolve_dtype
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.system.device import cuda_has_bf16
from tests.modeling.test_packed_pairs import random_groups

CONFIG = LlamaConfig(
    vocab_size=131, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
GROUPS = random_groups(count=3)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


def log_probs(model):
    (micro_batch,) = pack_update(GROUPS, 512)
    with packed_attention(model.config):
        logps = packed_logprobs(model, micro_batch).logps
        if logps.requires_grad:
            logps.sum().backward()
    return logps.detach()


def test_census_of_a_qlora_model_in_bf16(base_folder):
    """R55: nothing of the base is upcast, neither what is stored nor what flows; adapters fp32."""
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    model = add_adapter(model, lora_config(8, 16, 0.0, None)).train()
    stored = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.dtype != torch.uint8
    }
    adapter = {name for name in stored if "lora_" in name}
    assert len(adapter) == 2 * 7 * 2
    assert {stored[name] for name in adapter} == {torch.float32}
    assert len(stored) - len(adapter) == 2 + 2 * 2 + 1  # embeddings, head, norms
    assert {stored[name] for name in stored.keys() - adapter} == {torch.bfloat16}
    flowing = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, args, out: flowing.append(out) if isinstance(out, torch.Tensor) else None
        )
    log_probs(model)
    assert len(flowing) > 20
    assert {tensor.dtype for tensor in flowing} == {torch.bfloat16}
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert grads == {torch.float32}


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_checkpoint_in_4_bits_is_loaded_as_it_is(base_folder, tmp_path, load_in_4bit):
    first = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    first.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=torch.bfloat16, load_in_4bit=load_in_4bit)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    adapted = [add_adapter(m, lora_config(8, 16, 0.0, None)).train() for m in (first, again)]
    for model in adapted:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.constant_(parameter, 0.02)
    assert torch.equal(*(log_probs(model) for model in adapted))
    for mine, theirs in zip(*(model.named_parameters() for model in adapted), strict=True):
        if mine[1].requires_grad:
            assert (mine[1].grad != 0).any()
            assert torch.equal(mine[1].grad, theirs[1].grad)


def quantized(base_folder, folder, **how):
    """A checkpoint that is stored quantized, its head too."""
    config = BitsAndBytesConfig(llm_int8_skip_modules=["nothing"], **how)
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_head_is_refused_by_name(base_folder, tmp_path, how):
    model = load_model(quantized(base_folder, tmp_path, **{how: True}), dtype=torch.bfloat16)
    kind = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[how]
    with pytest.raises(ValueError, match=f"the head is a {kind} .* lm_head left out"):
        get_lm_head(model)


def test_8_bit_weights_are_not_taken_for_4_bit_ones(base_folder, tmp_path):
    folder = quantized(base_folder, tmp_path, load_in_8bit=True)
    with pytest.raises(ModelError, match=r"quantized \(bitsandbytes\), and not in 4 bits"):
        load_model(folder, dtype=torch.bfloat16, load_in_4bit=True)


def anonymous_bytes():
    """What the process really holds; the pages of mapped weight files can be dropped any time."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("reads /proc/self/status")
    (line,) = [x for x in status.read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_4_bit_loading_never_holds_the_dense_model(tmp_path, soak):
    if not soak:
        pytest.skip("writes and reads 160 MB: --soak")
    # Small matrices: on the CPU bitsandbytes quantizes one with about 250 bytes a weight.
    config = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=704, num_hidden_layers=100,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense_bytes = sum(p.nbytes for p in dense.parameters())
    dense.save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 8
    del dense
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed is taken again, unseen
    before, seen, done = anonymous_bytes(), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(anonymous_bytes() - before)
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(str(tmp_path), dtype=torch.bfloat16, load_in_4bit=True)
    done.set()
    watcher.join()
    own = sum(t.nbytes for t in model.state_dict().values())
    peak = max(seen) / 2**20
    print(f"dense {dense_bytes / 2**20:.0f}, 4-bit {own / 2**20:.0f}, peak +{peak:.0f} MiB")
    assert own / 2 < max(seen) <= own + 0.5 * dense_bytes


def test_a_folder_without_a_tokenizer_is_told_so(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer file lies there\. Pass a local folder"):
        load_tokenizer(str(tmp_path))


def test_a_gpu_that_only_emulates_bfloat16_has_none(monkeypatch):
    """T4 and RTX 20: torch says yes unless it is told to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not cuda_has_bf16()
    assert resolve_dtype("auto") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype("auto") == torch.bfloat16
