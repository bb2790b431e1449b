"""Compiles the kernels of a layer's ops for every GPU without a GPU; prints one JSON line each.

Run in a process without TRITON_INTERPRET: python -m tests.fused_ops.layer_ops_compile [--one]. The
ops' own launch code runs on CPU tensors of real widths; what it would launch is recorded and
compiled as the JIT would specialize it. With --one each kernel once in bf16, the GPUs taken in
turn.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from fastdpo_kernels import (
    _backend,
    _triton_gated_activation,
    _triton_rms_norm,
    _triton_rotary,
    gated_activation,
    rms_norm,
    rotary,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 89, 90, 100, 120)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Recorder:
    """Stands in for a kernel: keeps the arguments of every launch and runs nothing."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((self.kernel, arguments, constants))

        return launch


@contextlib.contextmanager
def recorded():
    """The launches of what runs inside, in order."""
    launches, kept = [], []
    for module in (_triton_rms_norm, _triton_rotary, _triton_gated_activation):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, Recorder(getattr(module, name), launches))
    missing, _backend.missing_for_triton = _backend.missing_for_triton, lambda x: None
    try:
        yield launches
    finally:
        _backend.missing_for_triton = missing
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def norms(dtype, width, form="llama", residual=False, trains=False, centered=False):
    """rms_norm, forward and backward."""
    x = torch.zeros(8, width, dtype=dtype, requires_grad=True)
    weight = torch.zeros(width, dtype=dtype, requires_grad=trains)
    given = {"form": form, "centered": centered, "backend": "triton"}
    if residual:
        out, total = rms_norm(x, weight, residual=torch.zeros_like(x), **given)
        torch.autograd.backward((out, total), (out.detach(), total.detach()))
    else:
        rms_norm(x, weight, **given).sum(0, keepdim=True).expand(8, -1).backward(x.detach())


def turns(dtype, heads, size, turned=None, norm=None, trains=False, in_place=False, **given):
    """Rotary of q and k as projections give them, forward and backward."""
    q, k = (torch.zeros(1, 64, n, size, dtype=dtype, requires_grad=True) for n in heads)
    cos = torch.zeros(1, 64, turned or size, dtype=given.pop("angles", dtype))
    if norm is not None:
        widths = [size * n for n in heads] if norm == "whole" else (size, size)
        weights = [torch.zeros(n, dtype=dtype, requires_grad=trains) for n in widths]
        given |= {"q_weight": weights[0], "k_weight": weights[1]}
    outs = rotary(
        (q * 1).transpose(1, 2), (k * 1).transpose(1, 2), cos, cos,
        in_place=in_place, backend="triton", **given,
    )  # fmt: skip
    torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])


def gates(dtype, width, kind, packed=False, overwrite=False):
    """gated_activation, forward and backward."""
    leaf = torch.zeros(8, 2 * width if packed else width, dtype=dtype, requires_grad=True)
    up = None if packed else leaf * 1
    out = gated_activation(leaf * 1, up, kind=kind, overwrite=overwrite, backend="triton")
    out.backward(out.detach())


def run_all(one):
    """Every kind of launch, or each kernel once."""
    half = torch.bfloat16
    norms(half, 4096, residual=True)
    turns(half, (32, 8), 128, norm="head")
    gates(half, 14336, "silu", overwrite=True)
    if one:
        return
    for dtype in (half, torch.float32):
        for width in (128, 2560, 8192):
            norms(dtype, width, "gemma", residual=True, trains=True)
        for width in (3584, 16384):
            norms(dtype, width)
        norms(dtype, 4096, "olmo2", centered=True, trains=True)
        turns(dtype, (32, 8), 128, in_place=True)
        turns(dtype, (32, 32), 96)  # Phi-3-mini
        turns(dtype, (24, 8), 128, turned=96)  # Phi-4-mini
        turns(dtype, (64, 8), 128, interleaved=True, upcast=True)  # Cohere
        turns(dtype, (32, 32), 128, norm="whole", form="olmo2", angles=torch.float32)
        turns(dtype, (8, 4), 256, norm="head", form="gemma", trains=True)  # Gemma 3
        turns(dtype, (16, 8), 128, norm="head", trains=True)
        for kind in ("silu", "gelu_tanh", "gelu"):
            gates(dtype, 8960, kind)
        gates(dtype, 8192, "silu", packed=True)


def specialized(kernel, arguments, constants):
    """Signature, constants and attributes as the JIT makes them from a launch."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | constants
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = given[name]
        parameter = kernel.params[place]
        if parameter.is_constexpr or (is_specialized(parameter, value) and value == 1):
            signature[name], fixed[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0 and is_specialized(parameter, value)
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, fixed, attributes


def is_specialized(parameter, value):
    return isinstance(value, int) and not parameter.do_not_specialize


def compiled(launch, capability):
    """The compiled kernel's resources and memory instructions."""
    kernel, arguments, constants = launch
    options = {name: constants[name] for name in OPTIONS if name in constants}
    signature, fixed, attributes = specialized(kernel, arguments, constants)
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=options)
    sass = listing("-sass", binary.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing("-res-usage", binary.asm["cubin"]))
    accesses = re.findall(r"\b(?:LDG|STG)\.[\w.]+", sass)
    shown = {k: v for k, v in fixed.items() if k not in ("num_warps", "enable_fp_fusion")}
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "operand": signature[kernel.arg_names[0]],
        "constants": shown,
        "shared_bytes": binary.metadata.shared,
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "wide": sum(".128" in access for access in accesses),
        "narrow": sum(bool(re.search(r"\.[US]?(8|16)\b", access)) for access in accesses),
        "middle": sum(".64" in access for access in accesses),
        "accesses": len(accesses),
    }


def listing(option, cubin):
    """What cuobjdump, which comes with Triton, says of a cubin."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(folder / "cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(one):
    with recorded() as launches:
        run_all(one)
    known = set()
    for launch in launches:
        key = (launch[0].__name__, str(specialized(*launch)))
        if key in known:
            continue
        known.add(key)
        in_turn = CAPABILITIES[len(known) % len(CAPABILITIES)]
        for capability in (in_turn,) if one else CAPABILITIES:
            print(json.dumps(compiled(launch, capability)), flush=True)


if __name__ == "__main__":
    main("--one" in sys.argv)
