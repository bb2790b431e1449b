"""Compiles what calls would launch, for every GPU without a GPU; prints one JSON line per kernel.

Run in a process without TRITON_INTERPRET: python -m tests.fused_ops.triton_compile [--soak]. The
launches come from meta tensors, their specialization (types, divisibility by 16) from Triton's own
launcher.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from fastdpo_kernels._configs import CAPABILITIES, CONFIGS
from fastdpo_kernels._launch import launches
from fastdpo_kernels._torch import Bounds, LogitTransform, Request
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

SHARED_BYTES = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}
EXTRAS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype and options."""

    rows: int = 1024
    vocabulary: int = 128_256
    hidden: int = 4096
    dtype: torch.dtype = torch.bfloat16
    in_triton: bool = False  # the second GEMM too
    outputs: tuple = ()
    bias: bool = False
    softcap: float | None = None
    skip_mass: float = 0.0
    with_gradient: bool = True


def launches_of(case, capability):
    """What the call would launch on a GPU of that capability."""
    config = CONFIGS[capability, case.dtype.itemsize]
    if case.in_triton:
        config = replace(config, gradient_in_triton=True)

    def meta(*shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    request = Request(
        meta(case.vocabulary, case.hidden),
        meta(case.vocabulary) if case.bias else None,
        LogitTransform(softcap=case.softcap),
        case.outputs,
        Bounds(skip_mass=case.skip_mass),
    )
    states, targets = meta(case.rows, case.hidden), meta(case.rows, dtype=torch.int64)
    return launches(states, targets, request, config, with_gradient=case.with_gradient)


def source_of(launch, capability):
    """What Triton's launcher would compile for this launch on that GPU, and its options."""
    backend, kernel = make_backend(target_of(capability)), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**launch.options, "debug": False}
    bound, specialization, _ = bind(**launch.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, None
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def target_of(capability):
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def compiled(launch, capability):
    """The compiled kernel."""
    source, options = source_of(launch, capability)
    return triton.compile(source, target=target_of(capability), options=options)


def resources(binary):
    """Registers and stack frame from cuobjdump, which comes with Triton, and the machine code."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [str(folder / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2]), text


def row(launch, capability, case):
    """One JSON line."""
    binary = compiled(launch, capability)
    registers, stack, code = resources(binary)
    return {
        "kernel": launch.kernel.__name__,
        "capability": ".".join(map(str, capability)),
        "case": {k: str(v) for k, v in vars(case).items() if v != Case.__dict__[k]},
        "shared_bytes": binary.metadata.shared,
        "shared_limit": SHARED_BYTES[capability],
        "registers": registers,
        "stack_bytes": stack,
        "tensor_core": bool(re.search(r"\b\S*MMA\b", code)),
        "two_byte_loads_in_loops": two_byte_loads(code),
    }


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")


def two_byte_loads(code):
    """Global loads of two bytes inside loops that hold a matrix instruction."""
    lines = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(code)]
    found = 0
    for at, name, operands in lines:
        jump = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if jump and int(jump[1], 16) < at:
            body = [n for a, n, _ in lines if int(jump[1], 16) <= a <= at]
            if any("MMA" in n for n in body):
                found += sum(n.startswith("LDG") and "16" in n for n in body)
    return found


def cases(soak):
    """The calls to compile: the usual one, and with --soak every option, dtype and odd shape."""
    everything = {"outputs": EXTRAS, "bias": True, "softcap": 30.0}
    yield Case()
    yield Case(in_triton=True)
    if not soak:
        return
    for hidden in (4096, 2560, 64):
        for rows, vocabulary in ((1024, 128_256), (1000, 128_255)):
            shape = {"rows": rows, "vocabulary": vocabulary, "hidden": hidden}
            yield Case(**shape)
            yield Case(**shape, in_triton=True)
            yield Case(**shape, with_gradient=False)
            for options in ({"outputs": EXTRAS}, {"softcap": 30.0}, {"bias": True}, everything):
                yield Case(**shape, **options)
                yield Case(**shape, **options, with_gradient=False)
            yield Case(**shape, skip_mass=0.05, **everything)
            yield Case(**shape, dtype=torch.float16, **everything)
            yield Case(**shape, dtype=torch.float32, **everything)
    yield Case(hidden=1000, in_triton=True)


def main(soak):
    seen = set()
    for case in cases(soak):
        for capability in CAPABILITIES:
            for launch in launches_of(case, capability):
                source, options = source_of(launch, capability)
                key = (capability, source.hash(), str(options))
                gemm = launch.kernel.__name__ in ("logits_kernel", "gradient_kernel")
                if key not in seen and (soak or gemm or capability == (9, 0)):
                    print(json.dumps(row(launch, capability, case)), flush=True)
                seen.add(key)


if __name__ == "__main__":
    main("--soak" in sys.argv)
