"""Compiles every launch configuration for every card without a GPU; prints one JSON line each.

Run in a process without TRITON_INTERPRET: python tests/triton_compile.py [--one]. With --one only
the training kernels in bf16, for every card.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from fastdpo_kernels import _triton
from fastdpo_kernels._launch import CAPABILITIES, CONFIGS, ROW_TILES_PER_GROUP
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}
OPERANDS = {2: "bf16", 4: "fp32"}
STATISTICS = ("offset", "sum", "target_logit", "max", "weighted", "plain", "square", "row_offset")
STATISTICS += ("row_sum", "logp", "mass", "target_slope")
REALS = ("factor", "softcap", "inverse_temperature", "constant", "skip_mass")


def signature_of(kernel, constants, operand):
    """Types of a kernel's arguments: operands, fp32 statistics, int64 targets, numbers."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "target_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name.removesuffix("_ptr") in STATISTICS else f"*{operand}"
        else:
            types[name] = "fp32" if name in REALS else "i32"
    return types


def variants(config):
    """(kernel, constants, warps, stages) of everything that a call can launch."""
    shared = {"EMULATE_BF16": False, "PRECISION": "ieee", "E_SCALE": 1.0}
    everything = ("STORE_E", "EXTRAS", "HAS_BIAS", "HAS_SOFTCAP")
    for on in (("STORE_E",), (), everything, ("STORE_E", "odd H")):
        constants = {
            **shared, **{name: name in on for name in everything}, "EVEN_H": "odd H" not in on,
            "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_H": config.block_h,
            "GROUP": ROW_TILES_PER_GROUP,
        }  # fmt: skip
        yield _triton.logits_kernel, constants, config.num_warps, config.num_stages
    for skips in (False, True):
        constants = {
            **shared, "SKIPS": skips, "EVEN_H": True, "ROUND_OUTPUT": False, "BLOCK_N": config.gradient_block_n,
            "BLOCK_H": config.gradient_block_h, "BLOCK_V": config.block_v,
            "BLOCK_K": config.gradient_block_k,
        }  # fmt: skip
        warps, stages = config.gradient_num_warps, config.gradient_num_stages
        yield _triton.gradient_kernel, constants, warps, stages
    yield _triton.combine_kernel, {"BLOCK": 128}, 4, 3


def compiled(kernel, constants, operand, capability, warps, stages):
    """The compiled kernel's resources."""
    major, minor = capability
    source = ASTSource(kernel, signature_of(kernel, constants, operand), constexprs=constants)
    divisible = {n: 16 for n in kernel.arg_names if n.endswith(("_ptr", "_stride", "_size"))}
    places = {(kernel.arg_names.index(n),): [["tt.divisibility", v]] for n, v in divisible.items()}
    source.attrs = {p: a for p, a in places.items() if kernel.arg_names[p[0]] not in constants}
    target = GPUTarget("cuda", major * 10 + minor, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=target, options=options)
    return {
        "kernel": kernel.__name__,
        "capability": f"{major}.{minor}",
        "operand": operand,
        "constants": {k: v for k, v in constants.items() if isinstance(v, bool) and v},
        "shared_bytes": binary.metadata.shared,
        "shared_limit": SHARED_BYTES[capability],
        **resources(binary.asm["cubin"]),
        "tensor_core": bool(re.search(r"\b(mma|wgmma|tcgen05)", binary.asm["ptx"])),
    }


def resources(cubin):
    """Registers and stack frame from cuobjdump, which comes with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(folder / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def main(one):
    for capability in CAPABILITIES:
        for size, operand in list(OPERANDS.items())[: 1 if one else None]:
            launches = list(variants(CONFIGS[capability, size]))
            for kernel, constants, warps, stages in [launches[0], launches[4]] if one else launches:
                row = compiled(kernel, constants, operand, capability, warps, stages)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main("--one" in sys.argv)
