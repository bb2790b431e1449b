"""Reads a kernel's machine code: its loops, and what feeds the tensor cores in the main one.

A loop is a backward branch and all between it and its target. The main loop is the one with the
fewest instructions per matrix instruction (MMA): not the loop around it, nor a remainder.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

WARP = 32
KIB = 1024

_INSTRUCTION = re.compile(
    r"/\*(?P<at>[0-9a-f]{4,6})\*/\s+\{?\s*(?:@!?U?PT?\d*\s+)?(?P<name>[A-Z][A-Za-z0-9_.]*)(?P<rest>.*?);"
)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_NAMED = (
    "LDSM", "LDS", "STS", "STSM", "LDG", "STG", "LDL", "STL", "LDTM", "STTM", "BAR", "SYNCS",
    "FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "MUFU", "F2FP", "PRMT", "DEPBAR", "LDGDEPBAR",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: its address, its name with all modifiers, and its operands."""

    at: int
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That a thread moves with it, if it is a load, a store or a copy: 4 unless it says so."""
        return next((_BYTES[m] for m in self.name.split(".")[1:] if m in _BYTES), 4)

    @property
    def is_mma(self) -> bool:
        return self.base in ("HMMA", "HGMMA", "QGMMA") or bool(re.match(r"UTC\w*MMA", self.base))

    @property
    def is_copy(self) -> bool:
        """An asynchronous copy to shared memory: a thread's (cp.async) or of a whole tile (TMA)."""
        return self.base in ("LDGSTS", "UTMALDG", "UBLKCP")

    @property
    def kind(self) -> str:
        """What it is counted as."""
        if self.is_mma:
            return self.base
        if self.base in ("LDG", "LDGSTS"):
            return f"{self.base}.{8 * self.bytes}"
        if self.is_copy or self.base in _NAMED:
            return self.base
        return "other"


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, in order."""

    instructions: tuple[Instruction, ...]

    @property
    def mmas(self) -> tuple[Instruction, ...]:
        return tuple(i for i in self.instructions if i.is_mma)

    @property
    def copies(self) -> int:
        """Asynchronous copies that one pass starts, as instructions."""
        return sum(i.is_copy for i in self.instructions)

    @property
    def loads(self) -> tuple[Instruction, ...]:
        """Global loads into registers: the warp waits for what they bring."""
        return tuple(i for i in self.instructions if i.base == "LDG")

    @property
    def narrow_loads(self) -> int:
        """Global loads of 2 bytes or less: too narrow to be asynchronous."""
        return sum(i.bytes <= 2 for i in self.loads)

    @property
    def copy_groups_in_flight(self) -> int:
        """Groups of cp.async that are still under way when a pass begins to compute."""
        waits = [
            i for i in self.instructions if i.name.startswith("DEPBAR") and "SB0" in i.operands
        ]
        return max((_last_number(i.operands) for i in waits), default=0)

    @property
    def mma_waits(self) -> tuple[int, ...]:
        """Of wgmma (sm_90): at every wait in the loop, how many groups may still be under way."""
        waits = [i for i in self.instructions if i.name.startswith("WARPGROUP.DEPBAR")]
        return tuple(_last_number(i.operands) for i in waits)

    @property
    def mma_operands_in_registers(self) -> int:
        """MMAs of sm_90 whose left operand lies in registers: ptxas waits after each of them."""
        found = [i for i in self.mmas if i.base in ("HGMMA", "QGMMA")]
        return sum(i.operands.count("gdesc") == 1 and _left_is_register(i) for i in found)

    def by_kind(self) -> dict[str, int]:
        """How many instructions of each kind, the most frequent first, the uninteresting last."""
        found = Counter(i.kind for i in self.instructions)
        other = found.pop("other", 0)
        return dict(found.most_common()) | {"other": other}


def _last_number(operands: str) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)


def _left_is_register(instruction: Instruction) -> bool:
    left = instruction.operands.split(",")[1].strip()
    return bool(re.match(r"R\d+", left))


def instructions_of(sass: str) -> list[Instruction]:
    """All instructions of cuobjdump's -sass output; some put what they wait for behind operands."""
    return [
        Instruction(
            int(found["at"], 16), found["name"], re.split(r"\s[&?]", found["rest"])[0].strip()
        )
        for line in sass.splitlines()
        if (found := _INSTRUCTION.search(line))
    ]


def loops_of(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every loop; those of one instruction, on which a kernel ends, are none."""
    loops = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", branch.operands)
        if branch.base == "BRA" and target and int(target[1], 16) < branch.at:
            first = int(target[1], 16)
            loops.append(Loop(tuple(i for i in instructions if first <= i.at <= branch.at)))
    return loops


def main_loop(loops: Sequence[Loop]) -> Loop | None:
    """The loop that feeds the tensor cores, None of a kernel that has none."""
    with_mma = [loop for loop in loops if loop.mmas]
    return min(with_mma, key=lambda loop: len(loop.instructions) / len(loop.mmas), default=None)


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        instructions: of the whole kernel.
        loops: the loops in it, in order of their ends.
        registers: of a thread.
        stack_bytes: of a thread's stack frame; more than 0 where registers were spilled.
    """

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    registers: int
    stack_bytes: int

    @property
    def main(self) -> Loop | None:
        return main_loop(self.loops)

    @property
    def outside_loops(self) -> int:
        """Instructions that lie in no loop: what comes before and after."""
        inside = {i.at for loop in self.loops for i in loop.instructions}
        return sum(i.at not in inside for i in self.instructions)


def machine_code(cubin: bytes) -> MachineCode:
    """Disassemble with the cuobjdump that comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(program), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    instructions = instructions_of(text)
    if used is None or not instructions:
        raise RuntimeError(f"cuobjdump told no registers or no instructions: {text[:200]!r}.")
    return MachineCode(
        tuple(instructions), tuple(loops_of(instructions)), int(used[1]), int(used[2])
    )
