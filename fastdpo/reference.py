"""`python -m fastdpo.reference`: fill, show, check, carry and clean what runs keep on disk.

That is the stores of reference log-probs and, beside them, the prepared pairs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.cli.parser import command, parse
from fastdpo.data.pair_cache import entries, set_aside, summarize_entry
from fastdpo.options import DataOptions, ModelOptions, data_folder, reference_folder
from fastdpo.options.checks import Options, number, option
from fastdpo.ref_cache.archive import export_store, import_store
from fastdpo.ref_cache.maintenance import DAY_S, prune, prune_pairs, store_folders, summarize
from fastdpo.ref_cache.store import quarantine
from fastdpo.system import files
from fastdpo.system.console import print_line, table

ACTIONS = {
    "build": "compute the reference log-probs of a model and a dataset, without training",
    "info": "show every store (model, rows, size, age) and the prepared pairs",
    "verify": "read everything again and check it; set damaged files aside",
    "prune": "remove damaged files, those of killed runs and, if requested, what is unused",
    "export": "write one store to a file, to carry it to another machine",
    "import": "take in such a file",
}


@dataclass
class StoreOptions(Options):
    """Which stores, and what is done to them."""

    _argument_group_name = "Reference stores"

    ref_cache: str | None = field(
        default=None, metadata={"help": "Folder of all stores; unset: as in training."}
    )
    data_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the prepared pairs, or off; unset: as in training."},
    )
    store: str | None = field(
        default=None,
        metadata={"help": "Beginning of the name of one store, as info shows it; unset: all."},
    )
    file: str | None = field(
        default=None, metadata={"help": "The file to export to or to import from."}
    )
    unused_days: float | None = option(
        None,
        "Prune stores and prepared pairs that no run has used for so many days; unset: none.",
        check=number("30 is usual; 0 takes every store.", at_least=0),
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what prune would remove."})


def main(argv: Sequence[str]) -> None:
    """Do what the first word says."""
    action = argv[0] if argv else "--help"
    if action in ("--help", "-h"):
        print_line("usage: python -m fastdpo.reference ACTION [--option value ...]\n")
        for name, what in ACTIONS.items():
            print_line(f"  {name:8}{what}")
        print_line("\nEach action shows its options with --help.")
        return
    if action not in ACTIONS:
        raise ValueError(
            f"{action!r} is no action of fastdpo.reference: name one of {', '.join(ACTIONS)}."
        )
    if action == "build":
        _build(argv[1:])
        return
    parsed = parse(
        f"reference {action}",
        [StoreOptions],
        argv[1:],
        training=False,
        description=ACTIONS[action].capitalize() + ".",
    )
    options = parsed.group(StoreOptions)
    root = reference_folder(options.ref_cache)
    if root is None:
        raise ValueError("--ref_cache is off: name the folder of the stores, or leave it out.")
    {"info": _info, "verify": _verify, "prune": _prune, "export": _export, "import": _import}[
        action
    ](root, options)


def _build(argv: Sequence[str]) -> None:
    from fastdpo.trainer.from_options import make_trainer, without_output

    parsed = parse(
        "reference build",
        [ModelOptions, DataOptions],
        argv,
        training=True,
        description="Compute the reference log-probs that training with these options needs.",
    )
    if reference_folder(parsed.training.ref_cache) is None:
        raise ValueError("--ref_cache is off: there is nothing to build. Name a folder.")
    if not (parsed.model.full or parsed.model.qlora):
        parsed.model.lora = True  # as training does, which says so
    with without_output(parsed.training) as config:
        make_trainer(parsed.model, parsed.data, config).compute_references()


def _info(root: Path, options: StoreOptions) -> None:
    rows = []
    for folder in _chosen(root, options):
        found = summarize(folder)
        rows.append(
            (
                folder.name[:12],
                ", ".join(found.models) or "unknown",
                f"{found.rows:,}",
                str(found.shards),
                f"{found.bytes / 2**20:,.1f}",
                f"{found.age_s / DAY_S:.1f}",
                f"{found.unused_s / DAY_S:.1f}",
            )
        )
    count = "1 store" if len(rows) == 1 else f"{len(rows)} stores"
    print_line(f"{count} in {root}{'' if root.is_dir() else ', a folder that does not exist'}")
    if rows:
        columns = ("store", "model", "completions", "shards", "MiB", "days old", "days unused")
        print_line(table(columns, rows))
    known = [summarize_entry(path) for path in _entries(options)]
    if known:
        count = "1 set" if len(known) == 1 else f"{len(known)} sets"
        print_line(f"\n{count} of prepared pairs in {known[0].path.parent}")
        columns = ("pairs of", "pairs", "MiB", "days unused")
        rows = [
            (
                each.source if each.fault is None else f"damaged: {each.fault}",
                f"{each.pairs:,}",
                f"{each.bytes / 2**20:,.1f}",
                f"{each.unused_s / DAY_S:.1f}",
            )
            for each in known
        ]
        print_line(table(columns, rows))


def _verify(root: Path, options: StoreOptions) -> None:
    """Readers set damaged shards aside; here nothing is read for use, so it is done by name."""
    damaged = 0
    for folder in _chosen(root, options):
        found = summarize(folder)
        damaged += len(found.damaged)
        print_line(
            f"{folder.name[:12]}: {found.shards - len(found.damaged)} shards are whole, "
            f"{found.rows:,} completions"
        )
        for name, fault in found.damaged.items():
            quarantine(folder / name)
            print_line(f"  damaged and set aside: {name}: {fault}")
    known = [summarize_entry(path) for path in _entries(options)]
    bad = [each for each in known if each.fault is not None]
    for each in bad:
        set_aside(each.path)
        print_line(f"damaged and set aside: {each.path}: {each.fault}")
    if known:
        print_line(f"{len(known) - len(bad)} sets of prepared pairs are whole")
    if damaged or bad:
        raise ValueError(
            f"{damaged} damaged shards, {len(bad)} damaged sets of prepared pairs: the next run "
            "that needs them computes their rows, and prepares their pairs, again."
        )


def _prune(root: Path, options: StoreOptions) -> None:
    how: dict[str, Any] = {"unused_days": options.unused_days, "dry_run": options.dry_run}
    removed = [(prune(root, **how), "stores")]
    if (folder := data_folder(options.data_cache)) is not None and folder.is_dir():
        removed.append((prune_pairs(folder, **how), "sets of prepared pairs"))
    done = "would free" if options.dry_run else "freed"
    for found, what in removed:
        for path in (*found.unused, *found.stale_files):
            print_line(str(path))
        print_line(
            f"{len(found.unused)} {what} and {len(found.stale_files)} leftovers: {done} "
            f"{found.bytes / 2**20:,.1f} MiB"
        )


def _export(root: Path, options: StoreOptions) -> None:
    folders = _chosen(root, options)
    if len(folders) != 1:
        names = ", ".join(folder.name[:12] for folder in folders) or "none"
        raise ValueError(f"{len(folders)} stores in {root} ({names}): choose one with --store.")
    file = _file(options)
    if file.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"--file {file} lies in {root}, the folder of the stores: name a file elsewhere."
        )
    files.probe(file)
    count = export_store(folders[0], file)
    print_line(f"{count} shards of store {folders[0].name[:12]} are in {file}")


def _import(root: Path, options: StoreOptions) -> None:
    folder, new = import_store(_file(options), root)
    print_line(f"{new} new shards in {folder}")


def _chosen(root: Path, options: StoreOptions) -> list[Path]:
    folders = store_folders(root)
    chosen = [folder for folder in folders if folder.name.startswith(options.store or "")]
    if options.store and not chosen:
        raise ValueError(f"--store is {options.store!r}; none of {len(folders)} begins so.")
    return chosen


def _entries(options: StoreOptions) -> list[Path]:
    folder = data_folder(options.data_cache)
    return [] if folder is None or options.store else entries(folder)


def _file(options: StoreOptions) -> Path:
    if not options.file:
        raise ValueError("--file is missing: name the file to export to or to import from.")
    return Path(options.file).expanduser()


if __name__ == "__main__":
    sys.exit(command(main))
