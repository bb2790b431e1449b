"""What a call launches on a GPU that is not there: the JIT's kernels, compiled, and their grids.

Tensors are on the meta device and said to be on CUDA, Triton's driver is one that only names its
target. So the project's own launch code runs, and Triton compiles exactly what it would for these
arguments; nothing is launched. Products and other operations of torch are noted with their bytes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fastdpo_kernels
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.machine_code import MachineCode, machine_code

Capability = tuple[int, int]

FIRST_DEVICE = 1000
"""Numbers of the devices that are not there, by which the JIT keeps kernels of targets apart."""

NO_TRAFFIC = (
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "reshape", "transpose", "t",
    "slice", "select", "unsqueeze", "squeeze", "expand", "detach", "alias", "permute", "split",
    "as_strided", "empty_strided", "new_empty_strided", "unbind", "_reshape_alias",
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel as the JIT made it: machine code, what a CTA takes, and its source in TTIR."""

    code: MachineCode
    warps: int
    stages: int
    shared_bytes: int
    tensor_memory_columns: int
    ttir: str


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: its name.
        variant: the constants that are True, and types of the operands where not bf16.
        grid: CTAs, the product of the grid's sizes.
        sizes: its whole-number arguments by name.
        fp32_bytes: of its fp32 tensors.
        constants: compile-time numbers, the tile's sizes among them.
        compiled: the kernel, None where it failed to compile.
        failure: why it did.
    """

    kernel: str
    variant: str
    grid: int
    sizes: dict[str, int]
    fp32_bytes: int
    constants: dict[str, Any]
    compiled: Compiled | None
    failure: str = ""


@dataclass(frozen=True)
class Operation:
    """One operation of torch: FLOPs of a matrix product, bytes read and written of any other."""

    name: str
    flops: int
    bytes: int


@dataclass
class Work:
    """What a call did, in order of kind: kernels of Triton, and operations of torch."""

    launches: list[Launch] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


class _NamedTarget:
    """A Triton driver that has nothing but a name."""

    def __init__(self, capability: Capability) -> None:
        self.number = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return FIRST_DEVICE + self.number

    def get_current_stream(self, device: int) -> int:
        return 0


class _Noted(TorchDispatchMode):
    """Notes what operations cost that are no views."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in NO_TRAFFIC:
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            flops = 0
            if name in ("mm", "addmm", "addmm_"):
                left, right = tensors[-3:-1]
                flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            self.work.operations.append(Operation(name, flops, moved))
        return out


@contextmanager
def pretended(capability: Capability, properties: dict[str, Any]) -> Iterator[Work]:
    """Within it calls on meta tensors are compiled for a card that is not there, and noted.

    Args:
        capability: compute capability of the card, such as (9, 0).
        properties: what `torch.cuda.get_device_properties` shall say of it.

    Raises:
        RuntimeError: Triton runs in its interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: kernels are compiled in a process without it.")
    work = Work()
    card = SimpleNamespace(major=capability[0], minor=capability[1], **properties)
    active = driver._active
    driver.set_active(_NamedTarget(capability))  # pyrefly: ignore
    _forget_cards()
    is_meta = property(lambda tensor: tensor.device.type == "meta")
    try:
        with (
            mock.patch.object(torch.Tensor, "is_cuda", is_meta, create=True),
            mock.patch.object(torch, "is_autocast_enabled", return_value=False),
            mock.patch.object(torch, "autocast", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
            mock.patch.object(JITFunction, "run", _noting_run(work, JITFunction.run)),
            _Noted(work),
        ):
            yield work
    finally:
        driver._active = active
        _forget_cards()


def _forget_cards() -> None:
    """Empty the caches of the kernels' modules, which may hold what a card before this one said."""
    for name, module in list(sys.modules.items()):
        if name.startswith(fastdpo_kernels.__name__ + "."):
            for found in vars(module).values():
                if hasattr(found, "cache_clear"):
                    found.cache_clear()


def _noting_run(work: Work, run: Callable[..., Any]) -> Callable[..., Any]:
    """`JITFunction.run` that compiles, notes and launches nothing."""

    def noting(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names = {parameter.name for parameter in self.params}
        given = {name: value for name, value in kwargs.items() if name in names}
        bound = self.signature.bind(*args, **given)
        bound.apply_defaults()
        sizes = grid(dict(bound.arguments)) if callable(grid) else grid
        ctas = 1
        for size in sizes:
            ctas *= size
        failure, compiled = "", None
        try:
            compiled = _compiled(run(self, *args, grid=grid, warmup=True, **kwargs))
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error).strip()[:200]}"
        work.launches.append(_launch(self, bound.arguments, ctas, compiled, failure))

    return noting


def _launch(
    kernel: Any, given: dict[str, Any], ctas: int, compiled: Compiled | None, failure: str
) -> Launch:
    constant_names = {p.name for p in kernel.params if p.is_constexpr}
    constants = {n: getattr(v, "value", v) for n, v in given.items() if n in constant_names}
    tensors = {n: getattr(v, "base", v) for n, v in given.items() if n not in constants}
    tensors = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    variant = [name for name, value in constants.items() if value is True]
    floats = {t.dtype for t in tensors.values()} - {torch.float32, torch.int64, torch.bfloat16}
    variant += sorted(str(dtype).removeprefix("torch.") for dtype in floats)
    return Launch(
        kernel=kernel.fn.__name__,
        variant=" ".join(variant),
        grid=ctas,
        sizes={n: v for n, v in given.items() if type(v) is int and n not in constants},
        fp32_bytes=sum(4 * t.numel() for t in tensors.values() if t.dtype == torch.float32),
        constants=constants,
        compiled=compiled,
        failure=failure,
    )


@cache
def _compiled(kernel: Any) -> Compiled:
    """Disassembled once: the JIT hands out the same object for the same kernel."""
    facts = kernel.metadata
    return Compiled(
        machine_code(kernel.asm["cubin"]),
        facts.num_warps,
        facts.num_stages,
        facts.shared,
        getattr(facts, "tmem_size", 0) or 0,
        kernel.asm["ttir"],
    )
