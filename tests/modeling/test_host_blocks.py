"""Blocks, buffers and copies of a base in host memory, on a device and streams that are fakes."""

import gc
import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.modeling import base_weights, host_blocks, loading
from fastdpo.modeling.activations import apply_activation_plan
from fastdpo.modeling.base_weights import host_weights, weights_to_host
from fastdpo.modeling.host_blocks import PAGE, Copies, HostBlock
from fastdpo.modeling.loading import load_model
from fastdpo.planner import architecture_of, training_of
from fastdpo.planner.terms import WORKSPACE_BYTES, base_blocks, resident_bytes
from tests.modeling.test_activations import assert_equal, gradients
from tests.modeling.test_base_weights import (
    CONFIGS,
    LAYERS,
    folders,  # noqa: F401
    one_layer_a_block,  # noqa: F401
    plans,
    policy_of,
    reference,
)

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
kernel = importlib.import_module("fastdpo_kernels.lora_linear")


class Stream:
    """A stream by its happens-before order: how far each stream is known to have come."""

    def __init__(self, name):
        self.name, self.known = name, {name: 0}

    def run(self):
        """One more operation; what is known when it begins, itself included."""
        self.known = self.known | {self.name: self.known[self.name] + 1}
        return self.known

    def record_event(self):
        return self.known

    def wait_event(self, event):
        self.known = {
            name: max(self.known.get(name, 0), event.get(name, 0))
            for name in self.known.keys() | event.keys()
        }

    def wait_stream(self, other):
        self.wait_event(other.known)


def before(first, second):
    """Tell whether an operation (stream, what was known) has ended when another one begins."""
    name, known = first
    return second[1].get(name, 0) >= known[name]


class Operations:
    """Reads of weights by the computation, and copies into buffers, each with its place in time."""

    def __init__(self, monkeypatch):
        self.compute, self.copy = Stream("compute"), Stream("copy")
        self.reads, self.copies, self.owned, self.target = [], [], [], 0
        start, dense_weight = Copies.start, kernel.dense_weight

        @contextmanager
        def on(stream):
            yield
            if stream is None:  # of an offloaded input, which lies on the CPU
                return
            self.copies.append((self.target, self.source, ("copy", stream.run())))

        def started(copies, target, source):
            self.target, self.source = target.data_ptr(), source.data_ptr()
            return start(copies, target, source)

        def read(weight, dtype):
            self.reads.append((weight.data_ptr(), id(weight), ("compute", self.compute.run())))
            return dense_weight(weight, dtype)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copy)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(Copies, "start", started)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda memory, stream: self.own(memory, stream)
        )
        monkeypatch.setattr(kernel, "dense_weight", read)

    def own(self, memory, stream):
        assert stream is self.copy
        self.owned.append(memory.data_ptr())

    def check(self, weights):
        """Every read is of its own block, whose copy has ended, and which none overwrites.

        Returns the number of reads beside which a copy into another buffer runs.
        """
        owner = {
            id(tensor): block.host.data_ptr()
            for block in weights._blocks
            for tensor in block._tensors
        }
        sizes = {b.memory.data_ptr(): b.memory.nbytes for b in weights._buffers}
        assert sizes.keys() <= set(self.owned)
        beside = 0
        for pointer, weight, read in self.reads:
            (buffer,) = (at for at, size in sizes.items() if at <= pointer < at + size)
            into = [(source, each) for at, source, each in self.copies if at == buffer]
            ended = [source for source, each in into if before(each, read)]
            assert ended, "read before its copy has ended"
            assert ended[-1] == owner[weight], "read of another block"
            later = [each for _, each in into if not before(each, read)]
            assert all(before(read, each) for each in later), "overwritten while it is read"
            beside += any(
                at != buffer and not before(each, read) and not before(read, each)
                for at, _, each in self.copies
            )
        return beside


def streamed(folder, **options):
    """A model whose base is on the host, and whose copies believe that there is a GPU."""
    model = policy_of(folder, on_host=True, **options)
    host_weights(model)._copies = Copies(CUDA)
    return model


@pytest.mark.parametrize("buffers", [2, 3])
def test_copies_run_beside_the_computation_and_never_into_what_it_reads(
    folders,  # noqa: F811
    monkeypatch,
    buffers,
):
    seen = Operations(monkeypatch)
    model = streamed(folders["llama"])
    weights = host_weights(model)
    weights.use_buffers(buffers)
    for plan in plans(3):
        apply_activation_plan(model, plan)
        gradients(model)
        reference(model)
    assert len(seen.reads) >= 3 * 3 * 7 * LAYERS
    assert seen.check(weights) > len(seen.reads) / 2


@pytest.mark.parametrize("forgotten", ["wait", "wait_stream"])
def test_an_order_that_is_not_kept_is_found(folders, monkeypatch, forgotten):  # noqa: F811
    """The test above must be able to fail."""
    seen = Operations(monkeypatch)
    if forgotten == "wait":
        monkeypatch.setattr(Copies, "wait", lambda *_: None)
    else:
        monkeypatch.setattr(Stream, "wait_stream", lambda *_: None)
    model = streamed(folders["llama"])
    gradients(model)
    with pytest.raises(AssertionError, match=r"read before|overwritten while"):
        seen.check(host_weights(model))


class LateCopies:
    """Copies that are made at the last moment: when the computation waits for them."""

    def __init__(self, device):
        self.waiting = []

    def start(self, target, source):
        target.fill_(255)  # no number in any dtype
        self.waiting.append((target, source))
        return self.waiting[-1]

    def wait(self, copied):
        while any(each is copied for each in self.waiting):
            target, source = self.waiting.pop(0)
            target[: source.nbytes].copy_(source)

    def own(self, target):
        pass


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_nothing_is_read_before_its_copy_is_waited_for(folders, monkeypatch, kind):  # noqa: F811
    resident = policy_of(folders["llama"], on_host=False, kind=kind)
    wanted, without_adapter = gradients(resident), reference(resident)
    monkeypatch.setattr(base_weights, "Copies", LateCopies)
    model = policy_of(folders["llama"], on_host=True, kind=kind)
    for number, plan in enumerate(plans(4)):
        host_weights(model).use_buffers(2 + number % 2)
        apply_activation_plan(model, plan)
        assert_equal(gradients(model), wanted)
        assert torch.equal(reference(model), without_adapter)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_on_the_device_and_the_host_are_those_of_the_plan(
    folders,  # noqa: F811
    monkeypatch,
    family,
    kind,
    together,
):
    """To the byte; the meta device stands for the GPU."""
    targets = ["q_proj", "v_proj"] if family == "mixtral" else None
    model = policy_of(folders[family], on_host=False, kind=kind, targets=targets)
    architecture = architecture_of(model, family)
    training = training_of(model, "sgd")
    layer = base_blocks(architecture, training).bytes // LAYERS
    monkeypatch.setattr(host_blocks, "SMALL_BYTES", together * layer)
    weights = weights_to_host(model, torch.device("meta"))
    weights.use_buffers(3)
    model.get_base_model().tie_weights()  # which a meta device loses, and CUDA does not
    assert architecture_of(model, family) == architecture
    assert training_of(model, "sgd") == training
    blocks = base_blocks(architecture, training)
    assert weights.host_bytes == blocks.bytes
    assert len(weights._blocks) == blocks.count
    on_device = {id(t): t.nbytes for t in model.parameters() if t.is_meta}
    for block in weights._blocks:
        for weight in block._tensors:
            state = getattr(weight, "quant_state", None)
            while state is not None:
                tables = (state.code, state.offset)
                on_device |= {id(t): t.nbytes for t in tables if isinstance(t, torch.Tensor)}
                state = state.state2
    count = min(3, blocks.count)
    predicted = resident_bytes(architecture, training, embeddings_on_host=False, base_buffers=count)
    buffers = predicted.pop("buffers of the base")
    # Where three buffers have a block each, the last may be of fewer layers.
    spared = -LAYERS % together if blocks.count == count else 0
    assert weights.buffer_bytes == buffers - spared * layer
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(on_device.values()) == sum(predicted.values()) - WORKSPACE_BYTES - trained


class Cudart:
    """Counts what is pinned, and looks whether it is still there when it is unpinned."""

    def __init__(self, code=0):
        self.code, self.pinned, self.taken, self.waits = code, {}, {}, []

    def cudaHostRegister(self, address, size, flags):  # as CUDA calls it
        assert address % PAGE == size % PAGE == 0
        self.pinned[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        assert not self.taken[address].expired(), "freed before it is unpinned"
        assert self.waits.pop() == CUDA, "a copy may be on its way"
        del self.pinned[address]
        return 0


def test_host_memory_is_pinned_in_place_and_unpinned_before_it_is_freed(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cudart.waits.append(device))
    blocks = [HostBlock(size, CUDA) for size in (1, PAGE, 3 * PAGE + 5)]
    memories = [block.memory for block in blocks]
    cudart.taken = {m.data_ptr(): StorageWeakRef(m.untyped_storage()) for m in memories}
    del memories
    assert sorted(cudart.pinned.values()) == [PAGE, PAGE, 4 * PAGE]
    for block in blocks:
        assert cudart.pinned[block.memory.data_ptr()] >= block.memory.nbytes
    left = blocks[0].memory
    del blocks, block
    gc.collect()
    assert not cudart.pinned
    assert left.fill_(7).item() == 7
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(code=2))
    with pytest.raises(MemoryError, match=r"cannot pin 8,192 bytes .*CUDA error 2.*--base_weights"):
        HostBlock(PAGE + 1, CUDA)


MEASURED_LOAD = """
import gc, json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from fastdpo.modeling import base_weights
from fastdpo.modeling.loading import load_model

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def block(size, device, make=base_weights.HostBlock):
    seen.append(anonymous_bytes())
    return make(size, device)

config = LlamaConfig(
    vocab_size=64, hidden_size=1024, intermediate_size=8192, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=1,
)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
gc.collect()
base_weights.HostBlock = block
first, seen = anonymous_bytes(), []
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]), base_weights="host")
seen.append(anonymous_bytes())
print(json.dumps([base_weights.host_weights(model).host_bytes, max(seen) - first]))
"""
"""Sizes of the weights on the host, and of all memory that loading took and that is no file's."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_never_twice_in_host_memory(tmp_path, dtype, soak):
    """Those of the file's dtype go from the mapped file to their block; others are converted."""
    if not soak:
        pytest.skip("takes a process of its own, whose memory is its own; run by make soak")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the memory of a process")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED_LOAD, str(tmp_path), str(dtype).removeprefix("torch.")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    size, taken = json.loads(ran.stdout.splitlines()[-1])
    layer = (2 * 1024 * 1024 + 2 * 1024 * 128 + 3 * 1024 * 8192) * dtype.itemsize
    assert size == 3 * layer
    print(f"{size / 2**20:.0f} MiB of weights, at most {taken / 2**20:.0f} MiB taken")
    assert taken <= size + 1.5 * layer


def test_auto_takes_the_host_where_the_gpu_has_no_room(folders, monkeypatch):  # noqa: F811
    config = CONFIGS["llama"]
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    free = SimpleNamespace(bytes=0)
    monkeypatch.setattr(loading, "free_device_bytes", lambda device: free.bytes)
    for dtype, in_4bit, most in (
        (torch.float32, False, 4 * whole),
        (torch.bfloat16, False, 2 * whole),
        (torch.bfloat16, True, 2 * whole),
    ):
        free.bytes = int(most / loading.GPU_SHARE) + 2
        assert loading._fits(config, dtype, in_4bit, CUDA)
        free.bytes = int(most / loading.GPU_SHARE) - 8
        assert loading._fits(config, dtype, in_4bit, CUDA) == in_4bit
    free.bytes = int(1.5 * whole)  # bf16 does not fit, and NF4 does, whoever asks for it
    in_4bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    for more, goes in (({}, True), ({"load_in_4bit": True}, False), ({"options": in_4bit}, False)):
        model = load_model(folders["llama"], dtype=torch.bfloat16, base_weights="auto", **more)
        assert (host_weights(model) is not None) == goes
    free.bytes = 0
    options = {"dtype": torch.float32, "base_weights": "auto"}
    assert host_weights(load_model(folders["llama"], **options)) is not None
    free.bytes = 2**40
    assert host_weights(load_model(folders["llama"], **options)) is None


def test_a_block_whose_copy_failed_is_not_taken_to_be_there(folders, monkeypatch):  # noqa: F811
    """A recomputation asks for its layer again only where the backward has not."""

    def fails(*_):
        raise MemoryError("injected")

    model = policy_of(folders["llama"], on_host=True)
    weights = host_weights(model)
    with monkeypatch.context() as failing:
        failing.setattr(Copies, "start", fails)
        with pytest.raises(MemoryError):
            weights.before_backward(3)
    weights.before_forward(3)
    assert weights._buffer_of(3).block == 3
    assert weights._buffer_of(3).is_in_use
