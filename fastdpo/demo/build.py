"""Makes the demo's inputs: a tiny Llama that was taught a small language, and preference pairs.

The pairs are the model's own samples. The language is in `language.py`. Nothing is downloaded.
"""

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.demo.language import LIKED, Request, pair_of, speak, split_requests
from fastdpo.system import files

Report = Callable[[str], None]

FORMAT = 1
"""Version of the demo's files; files of another version are made again."""
MARKER, MODEL, TRAIN, DEV = "demo.json", "model", "train.jsonl", "dev.jsonl"

MAX_COMPLETION_TOKENS = 48
"""The longest completion of the language has 40 bytes."""


@dataclass(frozen=True)
class Demo:
    """Paths of the demo's inputs, and one held-out prompt to show.

    The prompt's guest is one whom the innkeeper dislikes, so the reference is mostly gruff.
    """

    model_dir: Path
    train_file: Path
    dev_file: Path
    prompt: str


@dataclass(frozen=True)
class Recipe:
    """Everything that the demo's files depend on."""

    seed: int = 0
    hidden_size: int = 64
    """All linear layers stay multiples of 32 wide: bitsandbytes' 4-bit code on CPUs needs it."""
    intermediate_size: int = 160
    updates: int = 350
    """Updates of teaching; by the 150th the model copies the guest's words."""
    texts_per_update: int = 32
    learning_rate: float = 8e-3
    train_pairs: int = 600
    dev_pairs: int = 150
    samples_per_prompt: int = 6
    prompts_per_batch: int = 128


RECIPE = Recipe()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: token id = byte value, then `<s>` `</s>` `<pad>`; begins with `<s>`.

    Returns:
        256 + 3 tokens, no merges, padding on the left as generation wants it.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}  # as GPT-2 shows them
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {symbols[byte]: byte for byte in range(256)}
    vocabulary |= {token: 256 + index for index, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_demo(folder: Path, *, seed: int = 0, report: Report, recipe: Recipe = RECIPE) -> Demo:
    """Make the demo's model and preference pairs in `folder`, or reuse those in it.

    Args:
        folder: gets `model/`, `train.jsonl`, `dev.jsonl` and, last, `demo.json`.
        seed: seeds everything random; the global random states are left as they are.
        report: called with one line before and after each longer phase.
        recipe: sizes; the defaults are what the demo runs with.

    Returns:
        The paths, and one held-out prompt to show.

    Raises:
        FileExistsError: `folder` holds files of these names that are not a demo's.
        RuntimeError: the taught model's samples gave no pair (too few updates in `recipe`).
        OSError: a file cannot be written; what is there is made again the next time.
    """
    recipe = dataclasses.replace(recipe, seed=seed)
    prompt = _finished_prompt(folder, recipe)
    if prompt is None:
        prompt = _make(folder, recipe, report)
    else:
        report(f"Demo: reusing the model and pairs in {folder}; delete it to make them again.")
    return Demo(folder / MODEL, folder / TRAIN, folder / DEV, prompt)


def _finished_prompt(folder: Path, recipe: Recipe) -> str | None:
    """The prompt to show if `folder` holds a complete demo of this recipe, else None."""
    names = (MODEL, TRAIN, DEV)
    missing = [name for name in names if not (folder / name).exists()]
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if len(missing) < len(names):
            present = next(name for name in names if name not in missing)
            raise FileExistsError(
                f"{folder} holds {present} but no {MARKER}, so it is not the demo's to overwrite: "
                f"make the demo in another folder, or move {present} away"
            ) from None
        return None
    except ValueError:
        return None
    wanted = {"format": FORMAT, "recipe": dataclasses.asdict(recipe), "complete": True}
    if missing or not isinstance(marker, dict):
        return None
    return marker.get("prompt") if wanted.items() <= marker.items() else None


def _make(folder: Path, recipe: Recipe, report: Report) -> str:
    marker = {"format": FORMAT, "recipe": dataclasses.asdict(recipe), "complete": False}
    files.write_json(folder / MARKER, marker)
    tokenizer = make_tokenizer()
    train_requests, dev_requests = split_requests(recipe.seed)
    with _own_rng(recipe.seed):
        model = _teach(tokenizer, train_requests, recipe, report)
        start = time.monotonic()
        train = _pairs(model, tokenizer, train_requests, recipe.train_pairs, recipe)
        dev = _pairs(model, tokenizer, dev_requests, recipe.dev_pairs, recipe)
    report(
        f"Demo: made pairs of its own samples, kinder against gruffer, in "
        f"{time.monotonic() - start:.1f} s: {len(train)} to train on, {len(dev)} held out."
    )
    _save(model, tokenizer, folder / MODEL)
    for name, rows in ((TRAIN, train), (DEV, dev)):
        files.write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    shown = next((row for row in dev if not row["prompt"].startswith(LIKED)), dev[0])
    files.write_json(folder / MARKER, {**marker, "complete": True, "prompt": shown["prompt"]})
    return shown["prompt"]


@contextmanager
def _own_rng(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside and restore it outside; no GPU's is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _teach(
    tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request], recipe: Recipe, report: Report
) -> LlamaForCausalLM:
    """Train a small Llama to speak the language, in both tones alike."""
    model = LlamaForCausalLM(_config(tokenizer, recipe)).train()
    size = sum(parameter.numel() for parameter in model.parameters())
    report(f"Demo: teaching a Llama of {size:,} parameters a small language of bytes ...")
    start, rng, loss = time.monotonic(), random.Random(recipe.seed), torch.zeros(())
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for update in tqdm(
        range(recipe.updates), desc="teaching", unit="update", leave=False, disable=None
    ):
        decay = 0.5 + 0.5 * math.cos(math.pi * update / recipe.updates)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(decay, (update + 1) / 20)
        requested = rng.choices(requests, k=recipe.texts_per_update)
        texts = [request.prompt + speak(request, rng) + "</s>" for request in requested]
        ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    report(
        f"Demo: taught it {recipe.updates * recipe.texts_per_update:,} lines in "
        f"{time.monotonic() - start:.1f} s; loss {loss.item():.3f} nats a byte."
    )
    return model.eval()


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _pairs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    wanted: int,
    recipe: Recipe,
) -> list[dict[str, str]]:
    """Make rows of the kindest and the gruffest sample for each request, skipping ties."""
    rows: list[dict[str, str]] = []
    with tqdm(total=wanted, desc="sampling", unit="pair", leave=False, disable=None) as bar:
        for first in range(0, len(requests), recipe.prompts_per_batch):
            requested = requests[first : first + recipe.prompts_per_batch]
            samples = _sample(model, tokenizer, requested, recipe.samples_per_prompt)
            pairs = (pair_of(*both) for both in zip(requested, samples, strict=True))
            rows += [row for row in pairs if row is not None]
            bar.update(min(len(rows), wanted) - bar.n)
            if len(rows) >= wanted:
                return rows[:wanted]
    if not rows:
        raise RuntimeError(
            f"no two well-formed samples of one of {len(requests)} prompts differ in tone after "
            f"{recipe.updates} updates of teaching; more are needed ({RECIPE.updates} by default)"
        )
    return rows


def _sample(
    model: Any,  # transformers annotates `generate` so that no model of its own fits
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[Request],
    count: int,
) -> list[list[str]]:
    """Sample `count` completions of each request at temperature 1, and keep those that end."""
    prompts = [request.prompt for request in requests]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=count,
        max_new_tokens=MAX_COMPLETION_TOKENS,
    )
    texts = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :])
    return [
        [text.split("</s>")[0] for text in texts[first : first + count] if "</s>" in text]
        for first in range(0, len(texts), count)
    ]


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save model and tokenizer in `folder`, completely or not at all."""
    temporary = files.temporary_name(folder)
    try:
        files.mkdir(temporary)
        files.call_writer(temporary, model.config.save_pretrained)
        files.call_writer(
            temporary / "model.safetensors",
            lambda path: save_file(model.state_dict(), path, {"format": "pt"}),
        )
        files.call_writer(temporary, tokenizer.save_pretrained)
        for path in temporary.iterdir():
            files.fsync(path)
        files.remove_if_possible(folder)
        files.replace(temporary, folder)
    finally:
        files.remove_if_possible(temporary)
