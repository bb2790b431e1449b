"""How each tensor of the merged model comes about, worked out from names and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdpo.merging.adapter import Adapter, LowRank
from fastdpo.merging.base import Base
from fastdpo.merging.tensor_files import DTYPES, NewTensor, StoredTensor

Tensors = dict[str, StoredTensor | NewTensor]


@dataclass(frozen=True)
class MergePlan:
    """What is to be written.

    Attributes:
        base: the model below.
        adapter: what is added.
        onto: "bf16" or "dequantized".
        files: file name -> its tensors; those that nothing changes are the base's own.
        names_in_memory: stored name -> the name in a loaded model, of every changed tensor.
        unties: whether embedding and head, tied in the base, differ in the result.
    """

    base: Base
    adapter: Adapter
    onto: str
    files: Mapping[str, Tensors]
    names_in_memory: Mapping[str, str]
    unties: bool

    def tensor(self, stored_name: str) -> Tensor:
        """A tensor of the result."""
        found = next(each[stored_name] for each in self.files.values() if stored_name in each)
        return found.read() if isinstance(found, StoredTensor) else found.compute()


@dataclass(frozen=True, slots=True)
class _Step:
    """What happens to one tensor of the base."""

    source: StoredTensor
    update: LowRank | None = None
    added_bias: StoredTensor | None = None
    flipped: bool = False
    through_4bit: torch.dtype | None = None
    scaling: float = 1.0

    def compute(self) -> Tensor:
        tensor = self.source.read()
        if self.through_4bit is not None:
            tensor = _there_and_back(tensor, self.through_4bit, self.flipped)
        if self.update is None and self.added_bias is None:
            return tensor
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if self.added_bias is not None:
            tensor.add_(self.added_bias.read().to(tensor.dtype), alpha=self.scaling)
        if (update := self.update) is None:
            return tensor
        weight = tensor.T if self.flipped else tensor  # (out, in), and the same memory
        b, a = update.b.read().to(tensor.dtype), update.a.read().to(tensor.dtype)
        weight.addmm_(b, a, alpha=self.scaling)
        if update.magnitude is not None:  # DoRA: rows of a learned length
            lengths = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_((update.magnitude.read().to(tensor.dtype) / lengths)[:, None])
        return tensor


def plan_merge(base: Base, adapter: Adapter, *, onto: str, dtype: torch.dtype) -> MergePlan:
    """Match the adapter with the base.

    Args:
        base: what it is merged into.
        adapter: what is merged.
        onto: "bf16" adds to the stored weights; "dequantized" sends those that QLoRA holds in 4
            bits there and back first.
        dtype: the precision in which they are quantized and come back.

    Raises:
        ValueError: the adapter belongs to another model, or changes what can't be merged.
    """
    steps = _steps(base, adapter, dtype if onto == "dequantized" else None)
    unties = _settle_ties(base, adapter, steps)
    files: dict[str, Tensors] = {file: dict(tensors) for file, tensors in base.shards.items()}
    names_in_memory = {}
    for name, step in steps.items():
        stored = base.stored_name(name)
        if stored is not None:
            below, file = _stored(base, name), base.shard_of(stored)
        else:  # a head that was tied and no longer is: beside the embedding, in its dtype
            stored, below = name, _stored(base, base.tied[name])
            file = base.shard_of(base.stored_name(base.tied[name]) or "")
        files[file][stored] = NewTensor(below.dtype, below.shape, partial(_Step.compute, step))
        names_in_memory[stored] = name
    return MergePlan(base, adapter, onto, files, names_in_memory, unties)


def _steps(base: Base, adapter: Adapter, through_4bit: torch.dtype | None) -> dict[str, _Step]:
    """In-memory name -> step, of every tensor that changes."""
    steps = {}
    for name, tensor in adapter.whole.items():
        below = _stored(base, name, adapter)
        if tensor.shape != below.shape:
            raise ValueError(
                f"{adapter.folder} holds {name} with the shape {tensor.shape}, and in "
                f"{base.name!r} it has {below.shape}: "
                + ("resize and save the base's embeddings first, and " if "emb" in name else "")
                + "pass the model that the adapter was trained on as --model."
            )
        steps[name] = _Step(tensor)
    for module in base.in_4bit if through_4bit else ():
        flipped = base.kinds[module] == "transposed"
        name = f"{module}.weight"
        steps.setdefault(
            name, _Step(_stored(base, name), flipped=flipped, through_4bit=through_4bit)
        )
    for module, update in adapter.low_rank.items():
        name = f"{module}.weight"
        flipped = _check_update(base, adapter, module, update)
        before = steps.get(name, _Step(_stored(base, name, adapter)))
        steps[name] = _Step(
            before.source,
            update,
            flipped=flipped,
            through_4bit=before.through_4bit,
            scaling=update.scaling,
        )
        if update.bias is not None:
            below = adapter.whole.get(f"{module}.bias") or _stored(base, f"{module}.bias", adapter)
            steps[f"{module}.bias"] = _Step(below, added_bias=update.bias, scaling=update.scaling)
    return steps


def _check_update(base: Base, adapter: Adapter, module: str, update: LowRank) -> bool:
    """Whether the weight is stored as (in, out); refuses what does not fit."""
    kind = base.kinds.get(module)
    if kind not in ("linear", "transposed", "embedding") or (kind == "embedding") != (
        update.embedding
    ):
        found = "no such module" if kind is None else f"{kind} there"
        raise ValueError(
            f"{adapter.folder} updates {module}, and {base.name!r} has {found}: pass the model "
            "that the adapter was trained on as --model."
        )
    if update.embedding and update.magnitude is not None:
        raise ValueError(
            f"{adapter.folder}: DoRA on the embedding {module} can't be merged here; use PEFT's "
            "merge_and_unload."
        )
    fits = (update.b.shape[0], update.a.shape[1])
    flipped = kind != "linear"
    fits = fits[::-1] if flipped else fits
    shape = _stored(base, f"{module}.weight", adapter).shape
    if shape != fits:
        raise ValueError(
            f"{adapter.folder} updates {module} as a weight of {fits}, and in {base.name!r} it is "
            f"of {shape}: pass the model that the adapter was trained on as --model."
        )
    return flipped


def _settle_ties(base: Base, adapter: Adapter, steps: dict[str, _Step]) -> bool:
    """Embedding and head of a tied base after the merge: one again, or from now on two."""
    unties = False
    for head, embedding in base.tied.items():
        if head in steps and embedding in steps:
            together = torch.equal(steps[head].compute(), steps[embedding].compute())
        elif head in steps or embedding in steps:
            # PEFT then keeps the embedding's update alone and gives it to the head too.
            together = embedding in steps and adapter.config.get("ensure_weight_tying", False)
        else:
            continue
        if not together:
            unties = True
            steps.setdefault(head, _Step(_stored(base, head)))
        elif base.stored_name(head) is None:
            steps.pop(head, None)
        else:  # the base's files hold it twice
            steps[head] = steps[embedding]
    return unties


def _stored(base: Base, name: str, adapter: Adapter | None = None) -> StoredTensor:
    """A tensor of the base; of a tied one, what it is tied to."""
    stored = base.stored_name(name) or base.stored_name(base.tied.get(name, name))
    if stored is None:
        raise ValueError(
            f"{adapter.folder if adapter else base.name} changes {name}, and the files of "
            f"{base.name!r} hold no such tensor: pass the model that the adapter was trained on as "
            "--model. Where it was this one, its files name tensors otherwise than the loaded "
            "model; use PEFT's merge_and_unload."
        )
    found = base.shards[base.shard_of(stored)][stored]
    if found.dtype not in DTYPES:
        raise ValueError(
            f"{found.path}: {stored} is of dtype {found.dtype}; {', '.join(DTYPES)} can be merged."
        )
    return found


def _there_and_back(weight: Tensor, dtype: torch.dtype, flipped: bool) -> Tensor:
    """The weight as a 4-bit layer sees it (NF4, double quantization), in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    straight = (weight.T if flipped else weight).to(device, dtype).contiguous()
    packed, state = quantize_4bit(straight, compress_statistics=True, quant_type="nf4")
    back = dequantize_4bit(packed, state).cpu()
    return back.T.contiguous() if flipped else back
