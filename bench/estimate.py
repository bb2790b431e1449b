"""How long compiled kernels would take on a GPU: an estimate from their machine code.

Not a measurement. Counted are the instructions of the main loop, the bytes that it moves and the
grid; rates are data-sheet figures and, for cuBLAS, DRAM and L2, those assumed in `CARDS`.

One pass of a main loop takes, in cycles of a CTA,
- tensor cores: 2 M N K per product over the card's FLOPs per cycle and SM;
- issue: instructions x warps / 4, an SM issuing four a cycle;
- shared memory: bytes written and read there / 128;
- L2: bytes of both operands over the SM's part of the L2 rate, where one is known;
and all of these overlap: the largest counts. Where the loop loads global memory into registers, or
waits for the last MMA it has started (sm_90), tensor cores and issue come one after the other, and
such loads add SYNCHRONOUS_LOAD cycles a pass. Each entry into the loop adds ENTRY cycles, for a
pipeline that fills. What lies outside of loops is issued once. CTAs that share an SM share its
rates, and hide their latencies behind each other. A launch takes whole waves of CTAs, and no
product is taken to be faster than cuBLAS. What DRAM costs a product is left out.

A kernel without MMA is taken to wait DEPENDENT_LOAD cycles for every pass of every loop that loads;
each such loop reads an equal part of the fp32 tensors; and not less than the bytes of all its loads
and stores, done once, over the DRAM rate. Operations of torch cost their bytes.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.launches import Capability, Compiled, Launch, Operation
from bench.machine_code import KIB, WARP, Loop

ENTRY = 800
SYNCHRONOUS_LOAD = 400
DEPENDENT_LOAD = 300
SHARED_BYTES_PER_CYCLE = 128
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it; rates of cuBLAS, DRAM and L2 as assumed, None if not.

    Attributes:
        sms: streaming multiprocessors.
        clock_hz: boost clock, at which `flops_per_cycle` gives the data sheet's rate.
        flops_per_cycle: of an SM's tensor cores, bf16 with fp32 sums, dense.
        shared_kib: shared memory of an SM; a CTA takes 1 KiB more than it asks for.
        warps: most that an SM holds.
    """

    name: str
    sms: int
    clock_hz: float
    flops_per_cycle: int
    shared_kib: int
    warps: int
    cublas_flops_per_s: float | None = None
    dram_bytes_per_s: float | None = None
    l2_bytes_per_s: float | None = None

    @property
    def peak_flops_per_s(self) -> float:
        return self.sms * self.clock_hz * self.flops_per_cycle

    @property
    def properties(self) -> dict[str, object]:
        """As `torch.cuda.get_device_properties` says them, as far as code may ask."""
        return {
            "name": self.name,
            "multi_processor_count": self.sms,
            "shared_memory_per_multiprocessor": self.shared_kib * KIB,
            "shared_memory_per_block_optin": (self.shared_kib - 1) * KIB,
            "max_threads_per_multi_processor": self.warps * WARP,
            "regs_per_multiprocessor": REGISTERS,
            "warp_size": WARP,
        }


CARDS: dict[Capability, Card] = {
    (8, 0): Card("A100", 108, 1.41e9, 2048, 164, 64),
    (8, 6): Card("RTX 3090", 82, 1.695e9, 512, 100, 48),
    (8, 9): Card("RTX 4090", 128, 2.52e9, 512, 100, 48, 150e12, 0.9e12),
    (9, 0): Card("H100", 132, 1.83e9, 4096, 228, 64, 700e12, 3.0e12, 7e12),
    (10, 0): Card("B200", 148, 1.86e9, 8192, 228, 64),
    (12, 0): Card("RTX 5090", 170, 2.407e9, 512, 100, 48),
}
"""One of each capability. The rates of cuBLAS (a product of 8192 cubed), DRAM and L2 are assumed,
until measured ones take their place."""


@dataclass(frozen=True)
class Tile:
    """The product that one `tl.dot` makes, and how many of them one entry into its loop does.

    Attributes:
        m, n, k: its sizes.
        per_entry: None where the bounds of the loop are not constant.
    """

    m: int
    n: int
    k: int
    per_entry: int | None

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def tile_of(ttir: str) -> Tile | None:
    """The largest `tt.dot` of a kernel's TTIR, None where it has none."""
    dots = re.findall(r"tt\.dot .*?tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", ttir)
    if not dots:
        return None
    m, k, n = max((tuple(map(int, dot)) for dot in dots), key=math.prod)
    before = ttir[: ttir.index("tt.dot ")]
    bounds = re.findall(r"scf\.for %\w+ = %(\w+) to %(\w+) step %(\w+)", before)
    low, high, step = (_constant(ttir, name) for name in bounds[-1]) if bounds else (None,) * 3
    count = None
    if low is not None and high is not None and step:
        count = max(1, (high - low) // step)
    return Tile(m, n, k, count)


def _constant(ttir: str, name: str) -> int | None:
    found = re.search(rf"%{name} = arith\.constant (-?\d+) :", ttir)
    return int(found[1]) if found else None


def products_per_pass(loop: Loop, tile: Tile, warps: int) -> float:
    """How many of the tile's products one pass of the machine code's loop does."""
    first = loop.mmas[0]
    if first.base.startswith("UTC"):  # one instruction takes up to 128 x 256 x 16
        each = 2 * min(tile.m, 128) * min(tile.n, 256) * 16
        return len(loop.mmas) * each / tile.flops
    if first.base in ("HGMMA", "QGMMA"):
        m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", first.name)[0])
        return len(loop.mmas) * 2 * m * n * k * (warps / 4) / tile.flops
    k = int(re.findall(r"\.16(?:8)(\d+)", first.name)[0])
    return len(loop.mmas) * 2 * 16 * 8 * k * warps / tile.flops


def ctas_per_sm(compiled: Compiled, card: Card) -> int:
    """That fit by registers, shared memory, warps and tensor memory; at least 1."""
    registers = -(-compiled.code.registers // 8) * 8 * WARP * compiled.warps
    shared = compiled.shared_bytes + KIB
    fits = [REGISTERS // registers, card.shared_kib * KIB // shared, card.warps // compiled.warps]
    if compiled.tensor_memory_columns:
        fits.append(TENSOR_MEMORY_COLUMNS // compiled.tensor_memory_columns)
    return max(1, min(fits))


def is_synchronous(loop: Loop) -> bool:
    """Whether a pass waits for global loads into registers, more than a value for each row."""
    return any(load.bytes <= 2 or load.bytes >= 8 for load in loop.loads)


def waits_for_last_mma(loop: Loop) -> bool:
    """Whether a pass of wgmma lets none be under way when it ends (sm_90)."""
    return bool(loop.mma_waits) and min(loop.mma_waits) == 0


@dataclass(frozen=True)
class PassCycles:
    """Cycles that one pass of a main loop takes of each resource of an SM."""

    products: float
    tensor: float
    issue: float
    shared: float
    l2: float
    latency: float
    serial: bool

    @property
    def busy(self) -> float:
        """Of what takes longest, with other CTAs to hide the rest."""
        return max(self.tensor, self.issue, self.shared, self.l2)

    @property
    def alone(self) -> float:
        """With the SM to itself."""
        work = self.tensor + self.issue if self.serial else 0.0
        return max(self.busy, work) + self.latency


def pass_cycles(compiled: Compiled, tile: Tile, card: Card) -> PassCycles:
    """Of the kernel's main loop."""
    loop = compiled.code.main
    assert loop is not None, "only a kernel with MMAs has a tile"
    products = products_per_pass(loop, tile, compiled.warps)
    l2 = 0.0
    if card.l2_bytes_per_s is not None:
        per_cycle = card.l2_bytes_per_s / card.sms / card.clock_hz
        l2 = products * 2 * (tile.m + tile.n) * tile.k / per_cycle
    return PassCycles(
        products=products,
        tensor=products * tile.flops / card.flops_per_cycle,
        issue=len(loop.instructions) * compiled.warps / 4,
        shared=_shared_bytes(loop, tile, compiled.warps, products) / SHARED_BYTES_PER_CYCLE,
        l2=l2,
        latency=SYNCHRONOUS_LOAD if is_synchronous(loop) else 0.0,
        serial=is_synchronous(loop) or waits_for_last_mma(loop),
    )


def _shared_bytes(loop: Loop, tile: Tile, warps: int, products: float) -> float:
    """Written to and read from shared memory in one pass of a CTA."""
    moved = 0.0
    for each in loop.instructions:
        if each.base in ("LDS", "STS", "LDGSTS") and "RZ" not in each.operands.split(",")[0]:
            moved += each.bytes * WARP * warps
        elif each.base == "LDSM":
            matrices = next((int(m) for m in each.name.split(".") if m in ("1", "2", "4")), 1)
            moved += 128 * matrices * warps
        elif each.base == "UTMALDG":
            moved += 2 * (tile.m + tile.n) * tile.k * products / max(1, loop.copies)
    first = loop.mmas[0].base
    if first in ("HGMMA", "QGMMA"):  # each group of four warps reads its rows of A and all of B
        rows = 0 if loop.mma_operands_in_registers else tile.m
        moved += 2 * (rows + tile.n * warps / 4) * tile.k * products
    elif first.startswith("UTC"):
        moved += 2 * (tile.m + tile.n) * tile.k * products
    return moved


def tensor_share(compiled: Compiled, card: Card) -> float | None:
    """Part of the tensor cores' peak that the main loop reaches on a full SM; None without MMA."""
    tile = tile_of(compiled.ttir)
    if tile is None or compiled.code.main is None:
        return None
    cycles = pass_cycles(compiled, tile, card)
    resident = ctas_per_sm(compiled, card)
    each = cycles.alone + _entry_cycles(tile, cycles)
    return cycles.tensor / max(cycles.busy, each / resident)


def _entry_cycles(tile: Tile, cycles: PassCycles) -> float:
    """Of filling the pipeline, spread over the passes of one entry, where these are few."""
    return 0.0 if tile.per_entry is None else ENTRY * cycles.products / tile.per_entry


@dataclass(frozen=True)
class Waves:
    """How the CTAs of a kernel's launches fill the SMs, all launches of a call together."""

    launches: int
    ctas: int
    waves: int
    slots: int

    @property
    def use(self) -> float:
        """Part of the slots of all waves in which a CTA runs."""
        return self.ctas / (self.waves * self.slots)


def waves_of(launches: Sequence[Launch], card: Card) -> Waves:
    """Of the launches of one kernel. A persistent grid counts as the whole waves that it is."""
    compiled = next(one.compiled for one in launches if one.compiled is not None)
    slots = ctas_per_sm(compiled, card) * card.sms
    waves = sum(-(-one.grid // slots) for one in launches)
    return Waves(len(launches), sum(one.grid for one in launches), waves, slots)


def launch_seconds(one: Launch, flops: float, card: Card) -> float:
    """Of one launch that does so many FLOPs in its main loop."""
    assert one.compiled is not None, one.failure
    code, warps = one.compiled.code, one.compiled.warps
    resident = ctas_per_sm(one.compiled, card)
    waves = -(-one.grid // (resident * card.sms))
    outside = code.outside_loops * warps / 4
    tile = tile_of(one.compiled.ttir)
    if tile is None or code.main is None:
        alone = _waiting_cycles(one) + outside + DEPENDENT_LOAD
        moved = sum(i.bytes for i in code.instructions if i.base in ("LDG", "STG"))
        floor_s = moved * WARP * warps * one.grid / (card.dram_bytes_per_s or math.inf)
        return max(waves * alone / card.clock_hz, floor_s)
    cycles = pass_cycles(one.compiled, tile, card)
    passes = flops / tile.flops / cycles.products / one.grid
    alone = passes * (cycles.alone + _entry_cycles(tile, cycles)) + ENTRY + outside
    together = resident * (passes * cycles.busy + outside)
    seconds = waves * max(alone, together) / card.clock_hz
    return max(seconds, flops / (card.cublas_flops_per_s or math.inf))


def _waiting_cycles(one: Launch) -> float:
    """Of a kernel without MMA: the passes of its loops that load, each waiting for its loads."""
    assert one.compiled is not None, one.failure
    loading = [loop for loop in one.compiled.code.loops if loop.loads]
    each = one.fp32_bytes / max(1, len(loading)) / one.grid
    threads = WARP * one.compiled.warps
    cycles = 0.0
    for loop in loading:
        passes = each / (sum(load.bytes for load in loop.loads) * threads)
        cycles += passes * (DEPENDENT_LOAD + len(loop.instructions) * one.compiled.warps / 4)
    return cycles


def operation_seconds(one: Operation, card: Card) -> float:
    """Of an operation of torch: a product at cuBLAS' rate, anything else at the DRAM's."""
    if one.flops:
        return one.flops / (card.cublas_flops_per_s or math.inf)
    return one.bytes / (card.dram_bytes_per_s or math.inf)
