"""What a script written for TRL imports beside its trainer: model options, YAML parser, adapters.

Names, defaults and return values are those of TRL 1.16's `scripts/dpo.py`; where one of TRL's
defaults is a trap, the docstring says what is done in its place.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from fastdpo.cli.yaml_file import load_yaml_config
from fastdpo.options.checks import Options, option
from fastdpo.options.model import DTYPES, LORA_ALPHA, LORA_DROPOUT, LORA_R
from fastdpo.options.removed import suggest_option

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

QUANT_TYPES = ("nf4", "fp4")


@dataclass
class ModelConfig(Options):
    """Which model, in which precision, with which adapter; TRL's names and defaults.

    Two defaults are not TRL's: 4-bit weights have their scales quantized too
    (`use_bnb_nested_quant`), and a single name in `lora_target_modules` is a name and not a pattern
    for whole paths. `attn_implementation` changes nothing and says so.

    Raises:
        ValueError: a wrong value, or one that cannot be done here, with what to do.
    """

    model_name_or_path: str | None = option(None, "Folder or hub id of the model to train.")
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    dtype: str | None = option(
        "float32",
        "Precision of the loaded weights; auto is bfloat16 on a CUDA GPU that supports it, else "
        "float32.",
        choices=list(DTYPES),
    )
    attn_implementation: str | None = option(
        None, "Not used: attention over packed pairs is fastdpo's own."
    )
    use_peft: bool = option(False, "Train a LoRA adapter.")
    lora_r: int = option(16, "Rank of the adapter.", check=LORA_R)
    lora_alpha: int = option(32, "Adapter scale, applied as alpha / r.", check=LORA_ALPHA)
    lora_dropout: float = option(
        0.05, "Dropout before the adapter, 0 to below 1.", check=LORA_DROPOUT
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers that get an adapter, or all-linear. Unset: what PEFT has for the model."
    )
    lora_target_parameters: list[str] | None = option(
        None, "Parameters that are no layers and get an adapter."
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Layers that are trained as a whole beside the adapter."
    )
    lora_task_type: str = option("CAUSAL_LM", "Must be CAUSAL_LM.")
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(r).")
    use_dora: bool = option(False, "DoRA, run by PEFT's own slower layers.")
    load_in_8bit: bool = option(False, "Must stay off; 4 bits are what is built.")
    load_in_4bit: bool = option(False, "Load the weights in 4 bits, for an adapter.")
    bnb_4bit_quant_type: str = option("nf4", "Kind of 4-bit weights.", choices=list(QUANT_TYPES))
    use_bnb_nested_quant: bool = option(
        True, "Quantize the scales of 4-bit weights too; on, for 0.4 bits a weight less."
    )
    bnb_4bit_quant_storage: str | None = option(None, "Must stay unset; it serves FSDP.")

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            raise ValueError(
                "--load_in_8bit cannot work here: 8-bit weights are not built. Use --load_in_4bit, "
                "or leave it out."
            )
        if self.bnb_4bit_quant_storage not in (None, "uint8"):
            raise ValueError(
                f"--bnb_4bit_quant_storage is {self.bnb_4bit_quant_storage!r}, which serves FSDP; "
                "fastdpo trains on one GPU: leave it out."
            )
        if self.lora_task_type != "CAUSAL_LM":
            raise ValueError(
                f"--lora_task_type is {self.lora_task_type!r}; DPO trains a causal language model: "
                "leave it out."
            )
        if self.load_in_4bit and not self.use_peft:
            raise ValueError(
                "--load_in_4bit is given without --use_peft, and 4-bit weights cannot be trained "
                "themselves: add --use_peft."
            )
        if self.dtype is None:
            self.dtype = "auto"
        super().__post_init__()
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"  # pyrefly: ignore[bad-assignment]
        if self.attn_implementation is not None:
            logger.warning(
                "--attn_implementation %s changes nothing: attention over packed pairs is "
                "fastdpo's own.",
                self.attn_implementation,
            )
            self.attn_implementation = None


def get_quantization_config(model_args: ModelConfig) -> "BitsAndBytesConfig | None":
    """How `model_args` has the weights quantized.

    The compute dtype is that of the other weights, as in TRL. On a GPU set `dtype` to bfloat16:
    with TRL's default, float32, embeddings and head take twice the memory.

    Returns:
        None without `load_in_4bit`, else NF4 (or FP4) with its scales quantized too, unless
        `use_bnb_nested_quant` is turned off.
    """
    if not model_args.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    from fastdpo.modeling.loading import resolve_dtype

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=resolve_dtype(str(model_args.dtype)),
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
    )


def get_peft_config(model_args: ModelConfig) -> "LoraConfig | None":
    """The adapter that `model_args` asks for; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


class TrlParser(HfArgumentParser):
    """A parser of dataclasses that also reads them from `--config file.yaml`; TRL's interface.

    The command line overrides the file, and the file the defaults. A mapping `env:` in the file
    sets environment variables. Unknown names are answered with advice.

    Args:
        dataclass_types: one dataclass or several.
        kwargs: for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        if dataclass_types is None:
            dataclass_types = []
        kinds = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        for kind in kinds:
            if any(entry.name == "config" for entry in fields(kind)):
                raise ValueError(
                    f"{kind.__name__} has a field named config, which is the parser's own: rename "
                    "it."
                )
        super().__init__(kinds, **kwargs)
        self._add_missing_negations()

    def _add_missing_negations(self) -> None:
        """`--no_x` for every flag: HfArgumentParser has it only where the default is True."""
        for kind in self.dataclass_types:
            for entry in fields(kind):  # pyrefly: ignore[bad-argument-type]
                is_flag = entry.type in (bool, bool | None)
                if is_flag and f"--no_{entry.name}" not in self._option_string_actions:
                    self.add_argument(
                        f"--no_{entry.name}",
                        f"--no-{entry.name.replace('_', '-')}",
                        action="store_false",
                        dest=entry.name,
                        default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS,
                    )

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse the command line and the file that its `--config` names.

        Args:
            args: the arguments; by default the process's.
            return_remaining_strings: also return what no dataclass knows, the file's first.
            fail_with_unknown_args: refuse unknown keys of the file; else they are said in the log.
            separate_remaining_strings: return the file's and the command line's apart.

        Returns:
            One instance for each dataclass, then the remaining strings if asked for.

        Raises:
            ValueError: an unknown name, or a wrong value.
        """
        words = list(sys.argv[1:] if args is None else args)
        remaining: list[str] = []
        if path := _take_config(words):
            values = load_yaml_config(Path(path))
            _set_environment(values.pop("env", None) or {}, path)
            remaining = self.set_defaults_with_config(**{str(key): values[key] for key in values})
            unknown = [self._advice(word) for word in remaining[::2]]
            if unknown and not return_remaining_strings:
                if fail_with_unknown_args:
                    raise ValueError(f"{path}: {'; '.join(unknown)}")
                logger.warning("%s: not used: %s", path, "; ".join(unknown))
        *parsed, rest = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if return_remaining_strings:
            return (
                *parsed,
                *((remaining, rest) if separate_remaining_strings else [remaining + rest]),
            )
        if rest:
            raise ValueError(self._advice(next((w for w in rest if w.startswith("--")), rest[0])))
        return tuple(parsed)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Make values the defaults of the options of these names, subcommands' included.

        Returns:
            The values that belong to no option, as `--name`, `value`, ...
        """
        used: set[str] = set()
        for parser in self._with_subparsers():
            for action in parser._actions:
                if action.dest in kwargs:
                    action.default, action.required = kwargs[action.dest], False
                    used.add(action.dest)
        return [w for n, v in kwargs.items() if n not in used for w in (f"--{n}", str(v))]

    def _with_subparsers(self) -> Sequence[argparse.ArgumentParser]:
        found: list[argparse.ArgumentParser] = [self]
        for parser in found:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    found += action.choices.values()
        return found

    def _advice(self, word: str) -> str:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        known = {action.dest for parser in self._with_subparsers() for action in parser._actions}
        return f"unknown option --{name}; {suggest_option(name, known, '--')}"


def _take_config(words: list[str]) -> str | None:
    """Take `--config file` out of the arguments."""
    for place, word in enumerate(words):
        if word.startswith("--config="):
            return words.pop(place).partition("=")[2]
        if word == "--config":
            if place + 1 == len(words):
                raise ValueError("--config is the last argument; name the YAML file after it.")
            words.pop(place)
            return words.pop(place)
    return None


def _set_environment(values: Any, path: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: env holds {values!r}; write variables as NAME: value below it.")
    os.environ.update({str(name): str(value) for name, value in values.items()})
