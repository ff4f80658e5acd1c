"""What a run is: every knob of `python -m train` once, with its default and its help.

A value comes from the command line, else from the YAML file given by `--config`, else from the DeepSpeed JSON (batch
numbers, clipping, precision), else from the default here. What cannot be is refused here, before anything is built.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from train.utils.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")

DESCRIPTION = """\
Train GPT-2 on a token file.

  python -m train --run_type baseline ...           plain PyTorch: eager attention, fp32, the plain loss
  accelerate launch --config_file accelerate_configs/deepspeed.yaml -m train --run_type optimized \\
      --deepspeed_config ds_configs/zero2.json ...  DeepSpeed, FlashAttention, the chunked loss, bf16 where it is fast

Every flag may also stand in a YAML file given by --config; the command line wins over the file.
The run is written to CHECKPOINT_PATH/RUN_TYPE: checkpoints, metrics.jsonl (a line a step) and metrics.json.
"""


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class RunConfig:
    """One run. Sizes are in tokens, batch numbers in sequences per process, times in optimizer steps."""

    run_type: Literal["baseline", "optimized"] = _flag("baseline", "plain PyTorch, or DeepSpeed with everything on")
    model: str = _flag(
        "gpt2",
        "a fresh gpt2, gpt2-medium, gpt2-large, gpt2-xl or tiny; or what holds the weights to start from: a folder, a "
        "Hub id (owner/name, or owner/name@revision) or nanoGPT's ckpt.pt",
    )
    train_data_path: str = _flag("data/train.bin", "tokens to train on, from python -m train.preprocess_data")
    val_data_path: str = _flag("data/val.bin", "tokens to validate on")
    checkpoint_path: str = _flag("checkpoint", "the run is written to the folder named after the run type in here")
    epochs: float = _flag(1.0, "passes over the training tokens")
    max_steps: int | None = _flag(None, "optimizer steps in all (default: what the epochs take)")
    block_size: int | None = _flag(None, "tokens in a sequence (default: the model's n_positions)")
    document_mask: bool = _flag(False, "documents in one sequence do not see each other; positions restart in each")
    train_micro_batch_size_per_gpu: int | None = _flag(
        None, "sequences per process and forward pass (default: the DeepSpeed JSON's number, else 4)"
    )
    gradient_accumulation_steps: int | None = _flag(
        None, "micro-batches per optimizer step (default: the DeepSpeed JSON's number, else 1)"
    )
    optimizer: Literal["adamw", "muon"] = _flag(
        "adamw", "adamw, or muon: Muon for the blocks' matrices and AdamW for the rest (run type baseline)"
    )
    learning_rate: float | None = _flag(None, "peak learning rate (default: 6e-4, or 5e-5 from weights)")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = _flag(
        "cosine", "after a linear warm-up: cosine or linear decay, constant, or warm-up, stable, decay (last fifth)"
    )
    warmup_steps: int | None = _flag(None, "steps of linear warm-up (default: a twentieth of all, at most 2000)")
    min_learning_rate_ratio: float = _flag(0.1, "the learning rate at the end as a share of the peak")
    weight_decay: float = _flag(0.1, "decoupled weight decay of matrices and embeddings; none of biases and norms")
    adam_beta1: float = _flag(0.9, "AdamW's first moment decay")
    adam_beta2: float = _flag(0.95, "AdamW's second moment decay")
    max_grad_norm: float | None = _flag(
        None, "clip the gradient's global norm, 0 for never (default: the DeepSpeed JSON's number, else 1.0)"
    )
    dropout: float = _flag(0.0, "dropout of embeddings, attention and residuals")
    eval_interval: int = _flag(0, "steps between validations; 0: at the end only")
    eval_steps: int | None = _flag(None, "batches per process in a validation (default: the whole of the file)")
    save_interval: int = _flag(0, "steps between checkpoints; 0: at the end only")
    save_total_limit: int | None = _flag(None, "keep this many of the newest checkpoints (default: all)")
    seed: int = _flag(1337, "of the initial weights, the order of data and dropout")
    attn_implementation: str | None = _flag(
        None,
        "auto, flash_attention_2, flash_attention_3, flash_attention_4, sdpa or eager "
        "(default: eager for baseline, auto for optimized)",
    )
    loss_chunk_size: int | None = _flag(
        None, "rows of hidden states per chunk of the loss, 0 for full logits (default: 0 for baseline, else 512)"
    )
    mixed_precision: Literal["auto", "no", "bf16"] | None = _flag(
        None, "auto is bf16 where the hardware is good at it (default: no for baseline, auto for optimized)"
    )
    torch_compile: bool = _flag(False, "compile the transformer blocks (needs a C++ compiler on CPU)")
    activation_checkpointing: Literal["none", "full", "selective"] | None = _flag(
        None,
        "recompute the activations of each block in the backward pass: full for all of them, selective for all but "
        "the outputs of matmuls and of the attention kernel (default: full where the DeepSpeed JSON has an interval, "
        "else none)",
    )
    activation_checkpointing_interval: int | None = _flag(
        None, "layers of a pipeline stage that are recomputed together (default: the DeepSpeed JSON's number, else 1)"
    )
    deepspeed_config: str | None = _flag(
        None,
        "DeepSpeed JSON of an optimized run, for example ds_configs/zero2.json; where there is no such file, the one "
        "that is part of the package",
    )
    pipeline_stages: int | None = _flag(
        None, "pipeline stages of an optimized run (default: the DeepSpeed JSON's number, else 1)"
    )
    pipeline_schedule: Literal["1f1b", "dualpipev"] = _flag(
        "1f1b", "order of a pipeline's work; dualpipev cuts the model into twice as many stages, two a process"
    )
    resume_from_checkpoint: str | None = _flag(
        None, "continue from this step folder, or from the run's last whole one (latest)", nargs="?", const="latest"
    )
    overwrite: bool = _flag(False, "replace a run that is already in the output folder")
    report_to: str = _flag("tensorboard", f"trackers, comma separated, or none: {', '.join(TRACKERS)}")
    push_to_hub: str | None = _flag(None, "when done, upload the model with a card of the run to this owner/name")
    profile: bool = _flag(
        False, "record steps with torch.profiler: a trace of each process in the run's profile folder"
    )
    profile_steps: str = _flag("10:13", "the steps that --profile records: 10:13 is 10, 11 and 12")
    memory_snapshot: bool = _flag(
        False, "with --profile on CUDA: PyTorch's memory snapshot of the same steps, beside the traces"
    )
    prompt: str = _flag("def ", "the sample written at the end starts with this")
    max_new_tokens: int = _flag(100, "tokens in the sample at the end")

    @property
    def run_folder(self) -> Path:
        return Path(self.checkpoint_path) / self.run_type

    @property
    def optimized(self) -> bool:
        return self.run_type == "optimized"

    @property
    def profiled(self) -> range | None:
        """The steps to record, counted from 1 as in metrics.jsonl; None without --profile."""
        first, _, stop = self.profile_steps.partition(":")
        return range(int(first), int(stop)) if self.profile else None


# What a flag left open is, where neither the DeepSpeed JSON nor the hardware decides.
ENGINE_DEFAULTS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "pipeline_stages": 1,
    "activation_checkpointing": "none",
    "activation_checkpointing_interval": 1,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "baseline": {"attn_implementation": "eager", "loss_chunk_size": 0, **ENGINE_DEFAULTS},
    "optimized": {"attn_implementation": "auto", "loss_chunk_size": 512, **ENGINE_DEFAULTS},
}


def parse(argv: list[str] | None = None) -> RunConfig:
    """Command line and YAML file to a checked `RunConfig`.

    Raises:
        UserError: for an unknown key, a wrong type or a value that cannot be; names the key, the value, the remedy.
    """
    parser = HfArgumentParser(
        RunConfig,  # type: ignore[arg-type]
        prog="python -m train",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", metavar="RUN.yaml", help="YAML file with any of the flags below")
    # The deepspeed launcher appends this to the command; the rank itself comes from the environment.
    parser.add_argument("--local_rank", type=int, help="ignored, for launchers that pass it")
    file = parser.parse_known_args(argv)[0].config
    if file is not None:
        parser.set_defaults(**read_yaml(Path(file)))
    values = vars(parser.parse_args(argv))
    del values["config"], values["local_rank"]
    config = RunConfig(**values)
    check(config)
    return config


class _Help(HfArgumentParser().formatter_class):  # type: ignore[misc]
    """Keeps the description's lines and shows each default that is a value."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def read_yaml(file: Path) -> dict[str, Any]:
    """The flags in a YAML file, each of a known name and the right type."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: holds a {type(values).__name__}; write one 'flag: value' a line")
    types = get_type_hints(RunConfig)
    for key, value in values.items():
        if key not in types:
            raise UserError(f"--config {file}: {key!r} is not a flag; python -m train --help lists them")
        values[key] = _typed(key, value, types[key], file)
    return values


def _typed(key: str, value: Any, annotation: Any, file: Path) -> Any:
    options = [t for t in (get_args(annotation) or (annotation,)) if t is not type(None)]
    if value is None and type(None) in get_args(annotation):
        return None
    choices = [c for t in [annotation, *options] for c in get_args(t) if isinstance(c, str)]
    if choices:
        if value is False and "no" in choices:
            value = "no"  # YAML 1.1 reads a bare `no` as false
        if value in choices:
            return value
        raise UserError(f"--config {file}: {key} is {value!r}; choose from {', '.join(choices)}")
    wanted = options[0]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is wanted:
        return value
    remedy = f"write a {wanted.__name__}"
    if wanted in (int, float) and isinstance(value, str) and _is_number(value):
        remedy = f"YAML takes it for text; write {float(value) if wanted is float else int(float(value))!r}"
        if wanted is float and "e" in value.lower() and "." not in value:
            mantissa, _, exponent = value.lower().partition("e")
            remedy = f"YAML takes it for text; write {mantissa}.0e{exponent}"
    elif wanted is str:
        remedy = f'put it in quotes: "{value}"'
    raise UserError(f"--config {file}: {key} is {value!r}, a {type(value).__name__}; {remedy}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check(config: RunConfig) -> None:
    """Refuse values and combinations that cannot be.

    Raises:
        UserError: naming the key, the value and the remedy.
    """

    def refuse(key: str, remedy: str) -> None:
        raise UserError(f"--{key} {getattr(config, key)}: {remedy}")

    for key in ("max_steps", "block_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                "eval_steps", "save_total_limit", "pipeline_stages", "activation_checkpointing_interval"):  # fmt: skip
        value = getattr(config, key)
        if value is not None and value < 1:
            refuse(key, "must be at least 1")
    for key in ("eval_interval", "save_interval", "warmup_steps", "loss_chunk_size", "max_new_tokens", "seed"):
        value = getattr(config, key)
        if value is not None and value < 0:
            refuse(key, "must not be negative")
    for key in ("epochs", "learning_rate"):
        value = getattr(config, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            refuse(key, "must be a positive number")
    for key in ("weight_decay", "max_grad_norm"):
        value = getattr(config, key)
        if value is not None and not (math.isfinite(value) and value >= 0):
            refuse(key, "must be a number of at least 0")
    for key in ("adam_beta1", "adam_beta2", "dropout"):
        if not 0 <= getattr(config, key) < 1:
            refuse(key, "must be at least 0 and below 1")
    if not 0 <= config.min_learning_rate_ratio <= 1:
        refuse("min_learning_rate_ratio", "must be between 0 and 1")
    if config.report_to != "none":
        for name in config.report_to.split(","):
            if name.strip() not in TRACKERS:
                raise UserError(f"--report_to {name}: unknown tracker; choose from {', '.join(TRACKERS)}, or none")
    if not re.fullmatch(r"\d+:\d+", config.profile_steps):
        refuse("profile_steps", "write the first step and the one after the last, for example 10:13")
    first, stop = map(int, config.profile_steps.split(":"))
    if not 2 <= first < stop:
        refuse("profile_steps", "begin with 2 or later, for the step before warms the profiler up, and end after it")
    if config.activation_checkpointing_interval is not None and config.activation_checkpointing in (None, "none"):
        refuse("activation_checkpointing_interval", "nothing is recomputed; give --activation_checkpointing full")
    if config.memory_snapshot and not config.profile:
        raise UserError("--memory_snapshot: is taken of the steps that are profiled; add --profile, or drop it")
    if config.seed >= 2**32:
        refuse("seed", "must be below 2^32")
    if config.resume_from_checkpoint == "":
        refuse("resume_from_checkpoint", "is empty; name a step folder, or latest")
    if config.resume_from_checkpoint and config.overwrite:
        raise UserError("--resume_from_checkpoint and --overwrite contradict each other; give one of them")
    if config.optimizer == "muon" and config.optimized:
        refuse(
            "optimizer",
            "DeepSpeed flattens the matrices, and the Muon of its own scales and clips otherwise than PyTorch's, so "
            "layouts would not compute the same; use --run_type baseline (one process, DDP or FSDP2), with the "
            "optimizations as flags: --attn_implementation auto --loss_chunk_size 512 --mixed_precision auto",
        )
    if config.run_type == "baseline":
        if config.deepspeed_config:
            refuse("deepspeed_config", "the baseline is plain PyTorch; drop the flag or use --run_type optimized")
        if config.pipeline_stages is not None and config.pipeline_stages > 1:
            refuse("pipeline_stages", "the baseline is one whole model per process; use --run_type optimized")
