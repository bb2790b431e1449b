"""The options that say which model is trained, in which precision, and which of its weights."""

from dataclasses import dataclass
from pathlib import Path

from fastdpo.options.checks import Options, as_names, number, option, whole

MODEL_ALIASES = {
    "llama-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "ministral-8b": "mistralai/Ministral-8B-Instruct-2410",
    "ministral-3-8b": "mistralai/Ministral-3-8B-Instruct-2512",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "gemma-4-e2b": "google/gemma-4-E2B-it",
    "gemma-4-e4b": "google/gemma-4-E4B-it",
    "gemma-4-12b": "google/gemma-4-12B-it",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "phi-4": "microsoft/phi-4",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
}

DTYPES = ("auto", "bfloat16", "float16", "float32")
LORA_R = whole(1, "16 is usual")
LORA_ALPHA = number("Twice --lora_r is usual.", above=0)
LORA_DROPOUT = number("0 is usual.", at_least=0, below=1)


@dataclass
class ModelOptions(Options):
    """The options that say which model is trained, in which precision, and which weights."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = option(
        None,
        f"Folder, hub id or alias of the model to train; aliases: {', '.join(MODEL_ALIASES)}.",
        aliases=["--model"],
    )
    model_revision: str = option("main", "Branch, tag or commit on the hub; a commit never moves.")
    dtype: str = option(
        "auto",
        "Precision of the frozen weights; auto is bfloat16 on a CUDA GPU that supports it, "
        "else float32.",
        choices=list(DTYPES),
    )
    trust_remote_code: bool = option(
        False, "Run Python code that the model's repository ships; off, since it can do anything."
    )
    qlora: bool = option(False, "Train a LoRA adapter over 4-bit (NF4) weights: the least memory.")
    lora: bool = option(False, "Train a LoRA adapter over whole weights: faster, more memory.")
    full: bool = option(False, "Train every weight: about 16 bytes of memory per parameter.")
    use_peft: bool = option(
        False, "TRL's name of --lora, and together with --load_in_4bit of --qlora."
    )
    load_in_4bit: bool = option(
        False, "TRL's name: load 4-bit (NF4) weights, for an adapter; --qlora asks for both."
    )
    lora_r: int = option(
        16, "Rank of the adapter; 16 is enough for most preference data.", check=LORA_R
    )
    lora_alpha: int = option(
        32, "Adapter scale, applied as alpha / r; twice the rank is usual.", check=LORA_ALPHA
    )
    lora_dropout: float = option(
        0.0,
        "Dropout before the adapter, 0 to below 1; 0, since noise hides small preferences.",
        check=LORA_DROPOUT,
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers that get an adapter; unset: every linear layer but the head."
    )
    use_rslora: bool = option(
        False,
        "Scale the adapter by alpha / sqrt(r) in place of alpha / r; for ranks far above 16.",
    )
    use_dora: bool = option(
        False,
        "DoRA: train the length of each weight row apart from its direction. Runs PEFT's own "
        "layers, which are slower and hold more memory.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resolve_tuning()
        chosen = [f"--{name}" for name in ("qlora", "lora", "full") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} exclude each other: keep one. --qlora needs the least "
                "memory, --lora is faster where 16-bit weights fit, --full trains every weight."
            )
        self.lora_target_modules = as_names(self.lora_target_modules)
        if self.lora_target_modules in (["all-linear"], ["all"]):
            self.lora_target_modules = None
        if self.lora_target_modules == []:
            raise ValueError(
                "--lora_target_modules is empty; name at least one layer (q_proj v_proj), or leave "
                "it out for every linear layer but the head."
            )

    def _resolve_tuning(self) -> None:
        """Settle qlora, lora and full where TRL's names say the same."""
        for name in ("use_peft", "load_in_4bit", "use_rslora", "use_dora"):
            if self.full and getattr(self, name):
                raise ValueError(
                    f"--full trains every weight, and --{name} is for an adapter: keep one of them."
                )
        if self.load_in_4bit and not (self.use_peft or self.lora or self.qlora):
            raise ValueError(
                "--load_in_4bit is given without an adapter, and 4-bit weights cannot be trained "
                "themselves: add --use_peft, or pass --qlora, which means both."
            )
        if self.load_in_4bit:
            self.qlora, self.lora = True, False
        elif self.use_peft and not self.qlora:
            self.lora = True


def resolve_model(name: str) -> tuple[str, str | None]:
    """Resolve the name of a model: an alias becomes the repository that it stands for.

    Args:
        name: a folder, a hub id or one of `MODEL_ALIASES`.

    Returns:
        The folder or hub id to load, and one sentence to show where the name was an alias. A
        folder of that name wins over the alias.
    """
    repository = MODEL_ALIASES.get(name.lower())
    if repository is None or Path(name).is_dir():
        return name, None
    return repository, f"{name} means {repository} on the Hugging Face hub."
