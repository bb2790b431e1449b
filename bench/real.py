"""A real model in a folder, and real pairs for it: what `--model FOLDER` measures on.

The pairs are rasbt's 1,094 instruction preferences whose sides differ, as a user turn and two
assistant turns, so that the model's own chat template renders them.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.inputs import SHARED_DATA

INSTRUCTION_PAIRS = SHARED_DATA / "prefs" / "norm" / "rasbt_alpaca_pref.jsonl"
HELD_OUT = 96
"""The last so many pairs are never trained on."""


def content_name(folder: Path) -> str:
    """The folder's name and twelve hex digits of its config and weights: what a row names it by."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return f"{folder.name}-{digest.hexdigest()[:12]}"


def instruction_rows() -> list[dict[str, Any]]:
    """All conversational pairs, in the order of the file."""
    rows = []
    with INSTRUCTION_PAIRS.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["chosen"] == row["rejected"]:
                continue
            _, _, text = row["prompt"].partition("### Instruction:\n")
            text = text.removesuffix("\n\n### Response:\n").replace("\n\n### Input:\n", "\n\n")
            sides = {side: row[side] for side in ("chosen", "rejected")}
            rows.append(
                {"prompt": [{"role": "user", "content": text}]}
                | {s: [{"role": "assistant", "content": answer}] for s, answer in sides.items()}
            )
    return rows


def training_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """So many of the pairs that are not held out, drawn with a seed."""
    return random.Random(seed).sample(instruction_rows()[:-HELD_OUT], count)


def held_out_rows() -> list[dict[str, Any]]:
    """The pairs that are never trained on."""
    return instruction_rows()[-HELD_OUT:]


def load_real(
    case: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[dict]]:
    """Model, tokenizer and rows of a case; `folder` says where, `tuning` "qlora" loads 4 bits."""
    from fastdpo.modeling.loading import load_model

    model = load_model(
        case["folder"],
        dtype=getattr(torch, case["dtype"]),
        load_in_4bit=case["tuning"] == "qlora",
    )
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    return model, tokenizer, training_rows(case["rows"], seed)
