"""How each tensor of the merged model comes about, worked out from names and shapes alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fastdpo.merging.adapter import Adapter, LowRank
from fastdpo.merging.base import Base
from fastdpo.merging.rounding import ROUNDED, SWALLOWED, Rounding, round_update
from fastdpo.merging.tensor_files import (
    MERGEABLE_DTYPES,
    NewTensor,
    StoredTensor,
    check_mergeable,
)

Tensors = dict[str, StoredTensor | NewTensor]
OTHER_BASE = "pass the model that the adapter was trained on as --model."


@dataclass(frozen=True)
class MergePlan:
    """A merge, worked out and not yet written.

    Attributes:
        base: the model that is merged into.
        adapter: the adapter that is added.
        base_precision: "bf16" or "dequantized", as `--onto` says.
        rounding: "stochastic" or "nearest", as `--rounding` says.
        dtype: of the result; None keeps that of each of the base's tensors.
        files: the tensors of each file, by file name and stored name; those that nothing changes
            are the base's own.
        names_in_memory: the name in a loaded model of every changed tensor, by its stored name.
        unties: whether embedding and head, tied in the base, differ in the result.
        roundings: what became of each updated tensor in 16 bits, by its name in a loaded model;
            filled in as tensors are computed.
    """

    base: Base
    adapter: Adapter
    base_precision: str
    rounding: str
    dtype: torch.dtype | None
    files: Mapping[str, Tensors]
    names_in_memory: Mapping[str, str]
    unties: bool
    roundings: dict[str, Rounding] = field(default_factory=dict)

    @property
    def rounded(self) -> Rounding:
        """The counts of the updates of all tensors that were computed so far."""
        return sum(self.roundings.values(), Rounding())

    @property
    def may_swallow(self) -> bool:
        """True where rounding to nearest lost the update of a tensor that was computed so far."""
        return any(
            each.unchanged_nearest > SWALLOWED * each.weights for each in self.roundings.values()
        )

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that takes most bytes of the result."""
        bytes_of: Counter[torch.dtype] = Counter()
        for tensors in self.files.values():
            for tensor in tensors.values():
                bytes_of[tensor.dtype] += tensor.nbytes
        return bytes_of.most_common(1)[0][0]

    def tensor(self, stored_name: str) -> Tensor:
        """A tensor of the result, in the dtype in which it is written."""
        holder = next(tensors for tensors in self.files.values() if stored_name in tensors)
        return holder[stored_name].read()


@dataclass(frozen=True, slots=True)
class _Step:
    """The computation of one changed tensor.

    The arithmetic is not PEFT's: `merge` of a PEFT layer rounds B A, its product with the scaling
    and the sum one after another, `addmm` once. They agree to the last bit where the scaling is a
    power of two, and differ in a quarter to a half of the fp32 weights elsewhere.
    """

    name: str
    source: StoredTensor
    below: StoredTensor | None = None  # of the base, where the source takes its place
    update: LowRank | None = None
    added_bias: StoredTensor | None = None
    transposed: bool = False
    through_4bit: torch.dtype | None = None
    scaling: float = 1.0

    def written(
        self,
        dtype: torch.dtype,
        *,
        stochastic: bool,
        seed: int,
        roundings: dict[str, Rounding],
    ) -> Tensor:
        """The merged tensor in a dtype; notes in `roundings` what became of its update."""
        start = self._start()
        exact = self._added(start)
        trained = exact is not start or self.below is not None
        if not trained or dtype not in ROUNDED:
            return exact.to(dtype)
        before = start if self.below is None else self.below.read()
        tensor, roundings[self.name] = round_update(
            before, exact, dtype, stochastic=stochastic, seed=f"{seed} {self.name}"
        )
        return tensor

    def compute(self) -> Tensor:
        """The merged tensor, in fp32 or fp64 where something is added."""
        return self._added(self._start())

    def _start(self) -> Tensor:
        """The tensor to which is added, mapped where nothing was done to it."""
        tensor = self.source.read()
        if self.through_4bit is not None:
            tensor = _quantize_roundtrip(tensor, self.through_4bit, self.transposed)
        return tensor

    def _added(self, tensor: Tensor) -> Tensor:
        """A new tensor with what is added; the same one if that is nothing."""
        if self.update is None and self.added_bias is None:
            return tensor
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        tensor = tensor.to(dtype, copy=True)
        if self.added_bias is not None:
            tensor.add_(self.added_bias.read().to(dtype), alpha=self.scaling)
        if (update := self.update) is None:
            return tensor
        weight = tensor.T if self.transposed else tensor  # (out, in), and the same memory
        b, a = (each.read().to(dtype, copy=True) for each in (update.b, update.a))
        weight.addmm_(b, a, alpha=self.scaling)
        if update.magnitude is not None:  # DoRA: rows of a learned length
            lengths = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_((update.magnitude.read().to(dtype) / lengths)[:, None])
        return tensor


def plan_merge(
    base: Base,
    adapter: Adapter,
    *,
    base_precision: str,
    quantized_from: torch.dtype,
    dtype: torch.dtype | None = None,
    rounding: str = "stochastic",
    seed: int = 0,
) -> MergePlan:
    """Match the adapter with the base.

    Args:
        base: the model that is merged into.
        adapter: the adapter that is merged.
        base_precision: "bf16" adds to the stored weights; "dequantized" sends those that QLoRA
            holds in 4 bits there and back first.
        quantized_from: the precision in which they are quantized and come back.
        dtype: of all tensors that are written; None keeps the base's.
        rounding: "stochastic" where a 16-bit dtype swallows the update, or always "nearest".
        seed: of the stochastic rounding.

    Raises:
        ValueError: the adapter belongs to another model, or changes what can't be merged.
    """
    steps = _steps(base, adapter, quantized_from if base_precision == "dequantized" else None)
    unties = _resolve_ties(base, adapter, steps)
    files: dict[str, Tensors] = {file: dict(tensors) for file, tensors in base.shards.items()}
    names_in_memory = {}
    roundings: dict[str, Rounding] = {}
    options = {"stochastic": rounding == "stochastic", "seed": seed, "roundings": roundings}

    def new(step: _Step, below: StoredTensor) -> NewTensor:
        target = below.dtype if dtype is None else dtype
        size = below.nbytes // below.dtype.itemsize * target.itemsize
        compute = partial(_Step.written, step, target, **options)
        return NewTensor(target, below.shape, size, compute)

    for file, tensors in base.shards.items():
        for name, each in tensors.items():
            if dtype not in (None, each.dtype) and each.dtype in MERGEABLE_DTYPES:
                files[file][name] = new(_Step(name, each), each)
    for name, step in steps.items():
        below = _stored(base, name)
        # A head that was tied and no longer is comes beside the embedding, in its dtype.
        stored = base.stored_name(name) or name
        files[base.file_of[below.name]][stored] = new(step, below)
        names_in_memory[stored] = name
    return MergePlan(
        base, adapter, base_precision, rounding, dtype, files, names_in_memory, unties, roundings
    )


def _steps(base: Base, adapter: Adapter, through_4bit: torch.dtype | None) -> dict[str, _Step]:
    """The step of every tensor that changes, by its name in the loaded model."""
    steps = {}
    for name, tensor in adapter.whole.items():
        below = _stored(base, name, adapter)
        if tensor.shape != below.shape:
            raise ValueError(
                f"{adapter.folder} holds {name} with the shape {tensor.shape}, and in "
                f"{base.name!r} it has {below.shape}: "
                + ("resize and save the base's embeddings first, and " if "emb" in name else "")
                + OTHER_BASE
            )
        steps[name] = _Step(name, tensor, below)
    for module in base.in_4bit if through_4bit else ():
        name, transposed = f"{module}.weight", base.kinds[module] == "transposed"
        if name not in steps:
            source = _stored(base, name)
            steps[name] = _Step(name, source, transposed=transposed, through_4bit=through_4bit)
    for module, update in adapter.low_rank.items():
        name = f"{module}.weight"
        transposed = _check_update(base, adapter, module, update)
        before = steps.get(name) or _Step(name, _stored(base, name, adapter))
        steps[name] = replace(before, update=update, transposed=transposed, scaling=update.scaling)
        if update.bias is not None:
            bias = f"{module}.bias"
            source = adapter.whole.get(bias) or _stored(base, bias, adapter)
            steps[bias] = _Step(bias, source, added_bias=update.bias, scaling=update.scaling)
    return steps


def _check_update(base: Base, adapter: Adapter, module: str, update: LowRank) -> bool:
    """Refuse an update that does not fit its module; returns whether the weight is (in, out)."""
    kind = base.kinds.get(module)
    if kind not in ("linear", "transposed", "embedding") or (kind == "embedding") != (
        update.embedding
    ):
        present = "no such module" if kind is None else f"{kind} there"
        raise ValueError(
            f"{adapter.folder} updates {module}, and {base.name!r} has {present}: {OTHER_BASE}"
        )
    if update.embedding and update.magnitude is not None:
        raise ValueError(
            f"{adapter.folder}: DoRA on the embedding {module} can't be merged here; use PEFT's "
            "merge_and_unload."
        )
    transposed = kind != "linear"
    fits = (update.b.shape[0], update.a.shape[1])
    fits = fits[::-1] if transposed else fits
    shape = _stored(base, f"{module}.weight", adapter).shape
    if shape != fits:
        raise ValueError(
            f"{adapter.folder} updates {module} as a weight of {fits}, and in {base.name!r} it is "
            f"of {shape}: {OTHER_BASE}"
        )
    return transposed


def _resolve_ties(base: Base, adapter: Adapter, steps: dict[str, _Step]) -> bool:
    """Make steps for embedding and head of a tied base; returns whether they differ afterwards."""
    unties = False
    for head, embedding in base.tied.items():
        if head in steps and embedding in steps:
            stay_tied = torch.equal(steps[head].compute(), steps[embedding].compute())
        elif head in steps or embedding in steps:
            # PEFT then keeps the embedding's update alone and gives it to the head too.
            stay_tied = embedding in steps and adapter.config.get("ensure_weight_tying", False)
        else:
            continue
        if not stay_tied:
            unties = True
            steps.setdefault(head, _Step(head, _stored(base, head)))
        elif base.stored_name(head) is None:
            steps.pop(head, None)
        else:  # the base's files hold it twice
            steps[head] = steps[embedding]
    return unties


def _stored(base: Base, name: str, adapter: Adapter | None = None) -> StoredTensor:
    """A tensor of the base, by its name in the loaded model; a tied one may lie under the other's.

    Raises:
        ValueError: the files lack it, or nothing can be added to its dtype.
    """
    stored = base.stored_name(name) or base.stored_name(base.tied.get(name, name))
    if stored is None:
        raise ValueError(
            f"{adapter.folder if adapter else base.name} changes {name}, and the files of "
            f"{base.name!r} hold no such tensor: {OTHER_BASE} Where it was this one, its files "
            "name tensors otherwise than the loaded model; use PEFT's merge_and_unload."
        )
    tensor = base.shards[base.file_of[stored]][stored]
    check_mergeable(tensor)
    return tensor


def _quantize_roundtrip(weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """The weight as a 4-bit layer sees it (NF4, double quantization), in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    straight = (weight.T if transposed else weight).to(device, dtype).contiguous()
    packed, state = quantize_4bit(straight, compress_statistics=True, quant_type="nf4")
    back = dequantize_4bit(packed, state).cpu()
    return back.T.contiguous() if transposed else back
