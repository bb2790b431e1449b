"""Your own pairs: a JSONL file, tuples, a pandas frame, a set whose columns have other names.

    python examples/custom_dataset.py                   # the demo's tiny Llama, 7 s on two cores
    python examples/custom_dataset.py --model Qwen/Qwen3-0.6B --dataset owner/set \
        --columns prompt=question chosen=good rejected=bad

All give the same token ids, which is shown. docs/data-formats.md lists every shape that is read.
"""

import json
from pathlib import Path

import pandas
from example_inputs import parse
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_rows, rows_from, show_pairs
from fastdpo.options.data import column_roles

OTHER_NAMES = {"prompt": "context", "chosen": "good", "rejected": "bad"}


def forms(rows, folder):
    """Return the rows in several forms, by name, each as DPOTrainer takes it."""
    renamed = [{OTHER_NAMES[name]: row[name] for name in OTHER_NAMES} for row in rows]
    file = folder / "renamed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in renamed), encoding="utf-8")
    return {
        "dicts": rows,
        "tuples (prompt, preferred, dispreferred)": [tuple(row.values()) for row in rows],
        "pandas frame": pandas.DataFrame(rows),
        # On the command line: --dataset FILE --columns prompt=context chosen=good rejected=bad
        "file with other names": read_rows(str(file), columns=OTHER_NAMES),
        "frame with other names": rows_from(
            pandas.DataFrame(renamed), "my frame", columns=OTHER_NAMES
        ),
    }


def main(argv=None):
    inputs = parse(__doc__, argv, columns=[f"{name}={name}" for name in OTHER_NAMES])
    columns = column_roles(inputs.columns)
    rows = [
        {role: row[name] for role, name in columns.items()}
        for row in read_rows(inputs.dataset).rows
    ]
    folder = Path(inputs.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, dataset in forms(rows, folder).items():
        options = {"learning_rate": inputs.learning_rate, "max_steps": 2, "save_strategy": "no"}
        trainer = DPOTrainer(
            inputs.model,
            args=DPOConfig(inputs.output_dir, **options),
            train_dataset=dataset,
            peft_config=LoraConfig(target_modules="all-linear"),
        )
        hashes[name] = trainer.train_groups.content_hash
        print(f"{name:42}{len(trainer.train_groups):6} pairs, tokens {hashes[name][:12]}")
    print("\n" + show_pairs(trainer.train_groups.pairs, trainer.tokenizer, n=1))
    trainer.train()
    return hashes


if __name__ == "__main__":
    main()
