"""What a run is: every knob of `python -m train` once, grouped by topic, with its default, bounds and help.

A value comes from the command line, else from the YAML file given by `--config`, else from the DeepSpeed JSON (batch
sizes, clipping, precision), else from the default here. Impossible values and combinations are refused here, before
anything is built. Sizes are in tokens, batch sizes in sequences per process, times in optimizer steps.

The types are those of a resolved run (`train.run.setup`): until then, any flag whose default is None may be None.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from train.config import packaged
from train.config.arguments import ArgumentParser, duration, flag
from train.optim.schedule import SCHEDULES
from train.utils.errors import UserError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
NULL = ("", "null", "~")  # YAML's spellings of "not set", which leave a flag without a default unset

DESCRIPTION = """\
Train GPT-2 on a token file.

  python -m train --run_type baseline ...           plain PyTorch: eager attention, fp32, the plain loss
  accelerate launch --config_file accelerate_configs/deepspeed.yaml -m train --run_type optimized \\
      --deepspeed_config ds_configs/zero2.json ...  DeepSpeed, FlashAttention, the chunked loss, bf16 where it is fast

Every flag may also be set in a YAML file given by --config, alone or under the name of its topic; the command line
takes precedence. The run is written to CHECKPOINT_PATH/RUN_TYPE: checkpoints, metrics.jsonl (a line per step) and
metrics.json.
"""


@dataclass(frozen=True)
class Model:
    """Model"""

    run_type: Literal["baseline", "optimized"] = flag(
        "baseline", "baseline: plain PyTorch; optimized: DeepSpeed with all optimizations on"
    )
    model: str = flag(
        "gpt2",
        "a new gpt2, gpt2-medium, gpt2-large, gpt2-xl or tiny; or the weights to start from: a folder, a Hub id "
        "(owner/name, or owner/name@revision) or nanoGPT's ckpt.pt",
    )
    block_size: int = flag(None, "tokens in a sequence (default: the model's n_positions)", at_least=1)
    dropout: float = flag(0.0, "dropout probability of embeddings, attention and residuals", at_least=0, below=1)


@dataclass(frozen=True)
class Data:
    """Data"""

    train_data_path: str = flag("data/train.bin", "tokens to train on, from python -m train.preprocess_data")
    val_data_path: str = flag("data/val.bin", "tokens to validate on")
    document_mask: bool = flag(
        False, "documents packed into one sequence do not attend to each other; positions restart in each"
    )


@dataclass(frozen=True)
class Optimization:
    """Optimization"""

    epochs: float = flag(1.0, "passes over the training tokens", above=0)
    max_steps: int | None = flag(None, "optimizer steps in total (default: as many as the epochs take)", at_least=1)
    train_micro_batch_size_per_gpu: int = flag(
        None, "sequences per process and forward pass (default: as in the DeepSpeed JSON, else 4)", at_least=1
    )
    gradient_accumulation_steps: int = flag(
        None, "micro-batches per optimizer step (default: as in the DeepSpeed JSON, else 1)", at_least=1
    )
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: Muon for the weight matrices of the blocks and AdamW for the rest; baseline runs only"
    )
    learning_rate: float = flag(
        None,
        "peak learning rate (default: by the size of a new model, 6e-4 for gpt2; 5e-5 when starting from weights)",
        above=0,
    )
    lr_schedule: str = flag(
        "cosine",
        "after a linear warm-up: " + "; ".join(f"{name}: {each.description}" for name, each in SCHEDULES.items()),
        choices=SCHEDULES,
    )
    warmup_steps: int | None = flag(
        None, "steps of linear warm-up (default: a twentieth of all steps, at most 2000)", at_least=0
    )
    min_learning_rate_ratio: float = flag(
        0.1, "the learning rate at the end as a fraction of the peak", at_least=0, at_most=1
    )
    weight_decay: float = flag(
        0.1, "decoupled weight decay of matrices and embeddings; biases and norms have none", at_least=0
    )
    adam_beta1: float = flag(0.9, "decay rate of AdamW's first moment", at_least=0, below=1)
    adam_beta2: float = flag(0.95, "decay rate of AdamW's second moment", at_least=0, below=1)
    max_grad_norm: float = flag(
        None,
        "clip the global gradient norm to this value; 0: no clipping (default: as in the DeepSpeed JSON, else 1.0)",
        at_least=0,
    )
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "what to do when the loss or gradient norm is not finite: stop the run, or skip that update"
    )
    on_spike: Literal["off", "warn", "skip", "stop"] = flag(
        "off",
        "what to do when the loss or gradient norm is more than 6 standard deviations above the mean of the last 128 "
        "steps",
    )
    seed: int = flag(1337, "seed of the initial weights, the order of the data and dropout", at_least=0, below=2**32)


@dataclass(frozen=True)
class Evaluation:
    """Evaluation"""

    eval_interval: int = flag(0, "steps between validations; 0: at the end only", at_least=0)
    eval_steps: int | None = flag(None, "batches per process in a validation (default: the whole file)", at_least=1)
    early_stopping_patience: int | None = flag(
        None, "end the run after this many validations in a row without a new lowest loss", at_least=1
    )
    prompt: str = flag("def ", "prompt of the sample that is generated at the end")
    max_new_tokens: int = flag(100, "tokens to generate for the sample; 0: no sample", at_least=0)


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints"""

    checkpoint_path: str = flag("checkpoint", "parent folder; the run is written to CHECKPOINT_PATH/RUN_TYPE")
    save_interval: int = flag(0, "steps between checkpoints; 0: do not save by step count", at_least=0)
    save_minutes: float = flag(
        None,
        "minutes between temporary checkpoints, each deleted once two newer ones are complete; 0: do not save by time "
        "(default: 30 without --save_interval, else 0); the disk needs room for three, of 12 bytes a parameter each",
        at_least=0,
    )
    max_time: float | None = flag(
        None,
        "stop early enough to save a checkpoint within this time limit, H:M:S or D-H:M:S; a Slurm job also stops "
        "early enough before its own time limit",
        type=duration,
    )
    save_total_limit: int | None = flag(
        None,
        "keep only this many of the newest checkpoints (default: all); always two as long as one of them is temporary",
        at_least=1,
    )
    async_save: bool = flag(
        True,
        "write checkpoints in the background, from a copy in host memory (false: training waits, and no copy is made)",
    )
    keep_best: bool = flag(
        False,
        "also keep the checkpoint with the lowest validation loss, recorded in the file `best`; it is saved after the "
        "validation if its step has no checkpoint yet",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "resume from this step folder, or from the run's last complete checkpoint (latest)",
        nargs="?",
        const="latest",
    )
    delete_newer_checkpoints: bool = flag(
        False,
        "with --resume_from_checkpoint: delete the checkpoints of this run that are newer than the step folder that "
        "it names, or than the newest that can be read and is intact",
    )
    allow_changes: bool = flag(
        False,
        "with --resume_from_checkpoint: resume even if flags that differ from the checkpoint's (learning rate, "
        "schedule, decay, clipping, dropout, ...) would change the losses",
    )
    overwrite: bool = flag(False, "replace a run that is already in the output folder")


@dataclass(frozen=True)
class Speed:
    """Precision and speed"""

    attn_implementation: str = flag(
        None,
        "auto, flash_attention_2, flash_attention_3, flash_attention_4, sdpa or eager "
        "(default: eager for baseline, auto for optimized)",
    )
    loss_chunk_size: int = flag(
        None, "rows of hidden states per chunk of the loss; 0: full logits (default: 0 for baseline, else 512)",
        at_least=0,
    )  # fmt: skip
    mixed_precision: Literal["auto", "no", "bf16"] = flag(
        None, "auto: bf16 where the hardware is fast at it (default: no for baseline, auto for optimized)"
    )
    torch_compile: bool = flag(False, "compile the transformer blocks (needs a C++ compiler on CPU)")
    activation_checkpointing: Literal["none", "full", "selective"] = flag(
        None,
        "recompute the activations of each block in the backward pass; full: all of them; selective: all but "
        "the outputs of matmuls and of the attention kernel (default: full where the DeepSpeed JSON has an interval, "
        "else none)",
    )
    activation_checkpointing_interval: int = flag(
        None, "layers of a pipeline stage that are recomputed together (default: as in the DeepSpeed JSON, else 1)",
        at_least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Parallelism:
    """Parallelism"""

    deepspeed_config: str | None = flag(
        None,
        "DeepSpeed JSON of an optimized run, for example ds_configs/zero2.json; a path, or the name of a shipped file",
    )
    pipeline_stages: int = flag(
        None, "pipeline stages of an optimized run (default: as in the DeepSpeed JSON, else 1)", at_least=1
    )
    pipeline_schedule: Literal["1f1b", "dualpipev"] = flag(
        "1f1b", "pipeline schedule; dualpipev splits the model into twice as many stages, two per process"
    )
    timeout: int = flag(
        600,
        "seconds without progress in all processes, or without a sign of life from one, after which a job of several "
        "processes ends; must be longer than the first step, which may include compilation",
        at_least=1,
        at_most=10**7,
    )


@dataclass(frozen=True)
class Analysis:
    """Analysis"""

    profile: bool = flag(
        False, "record steps with torch.profiler: a trace of each process in the run's profile folder"
    )
    profile_steps: str = flag("10:13", "the steps that --profile records; 10:13 records steps 10, 11 and 12")
    memory_snapshot: bool = flag(
        False, "with --profile on CUDA: also write PyTorch's memory snapshot of the same steps"
    )


@dataclass(frozen=True)
class Output:
    """Output"""

    report_to: str = flag("tensorboard", f"trackers, comma separated, or none: {', '.join(TRACKERS)}")
    push_to_hub: str | None = flag(
        None, "after the run, upload the model with a model card to this repository (owner/name)"
    )


@dataclass(frozen=True)
class RunConfig(Output, Analysis, Parallelism, Speed, Checkpoints, Evaluation, Optimization, Data, Model):
    """One run: the flags of all groups. A dataclass takes the fields of its last base first, so Model's come first."""

    @property
    def run_folder(self) -> Path:
        return Path(self.checkpoint_path) / self.run_type

    @property
    def optimized(self) -> bool:
        return self.run_type == "optimized"

    @property
    def trackers(self) -> list[str]:
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    @property
    def profiled(self) -> range | None:
        """The steps to record, counted from 1 as in metrics.jsonl; None without --profile."""
        first, _, stop = self.profile_steps.partition(":")
        return range(int(first), int(stop)) if self.profile else None


GROUPS = RunConfig.__bases__[::-1]

# The values of flags that are not given, where neither the DeepSpeed JSON nor the hardware decides.
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
    """Command line and YAML file to a checked `RunConfig`; a `UserError` names flag, value and remedy."""
    parser = ArgumentParser(prog="python -m train", usage="python -m train [FLAGS]", description=DESCRIPTION)
    parser.add_argument(
        "--config", metavar="RUN.yaml", help="YAML file with any of the flags below, for example recipes/demo_cpu.yaml"
    )
    # The deepspeed launcher appends this to the command; the rank itself comes from the environment.
    parser.add_argument("--local_rank", type=int, help="ignored, for launchers that pass it")
    for group in GROUPS:
        parser.add_flags(group)
    namespace = parser.parse_args(argv)
    if namespace.config is not None:
        file = packaged.here_or_shipped(namespace.config, packaged.RECIPES)
        try:
            in_file = parser.parse_args([f"--{key}={value}" for key, value in _read_yaml(file)])
        except UserError as error:
            raise UserError(f"--config {file}: {error}") from None
        namespace = parser.parse_args(argv, in_file)
    values = vars(namespace)
    del values["config"], values["local_rank"]
    config = RunConfig(**values)
    check(config)
    return config


def _read_yaml(file: Path) -> list[tuple[str, str]]:
    """The (flag, value) pairs of a file, as they are written: argparse knows their types, YAML only guesses."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"holds a {type(values).__name__}; write one 'flag: value' per line")
    by_name = {group.__name__.lower(): {each.name: each for each in fields(group)} for group in GROUPS}
    every = {each.name: each for each in fields(RunConfig)}
    found = []
    for key, value in values.items():
        flags, pairs = (by_name[key], value) if key in by_name and isinstance(value, dict) else (every, {key: value})
        for name, text in pairs.items():
            if name not in flags:
                where = "" if flags is every else f" in the group {key}"
                nearest = did_you_mean(name, [*every, *by_name] if flags is every else flags)
                raise UserError(f"unknown flag {name}{where}; {nearest}--help lists all")
            if not isinstance(text, str):
                raise UserError(f"{name}: holds a {type(text).__name__}; write one value")
            if not (text in NULL and flags[name].default is None):
                found.append((name, text))
    return found


def check(config: RunConfig) -> None:
    """Refuse combinations that are impossible, and values whose bounds are not numbers."""

    def refuse(key: str, remedy: str) -> None:
        raise UserError(f"--{key} {str(getattr(config, key))[:80]}: {remedy}")

    for name in config.trackers:
        if name not in TRACKERS:
            nearest = did_you_mean(name, TRACKERS)
            raise UserError(
                f"--report_to {name}: unknown tracker; {nearest}choose from {', '.join(TRACKERS)}, or none"
            )
    if not re.fullmatch(r"\d{1,15}:\d{1,15}", config.profile_steps):
        refuse("profile_steps", "write the first step and the one after the last, for example 10:13")
    first, stop = map(int, config.profile_steps.split(":"))
    if not 2 <= first < stop:
        refuse(
            "profile_steps",
            "start at 2 or later (the profiler warms up in the step before), and end after the start",
        )
    if config.activation_checkpointing_interval is not None and config.activation_checkpointing in (None, "none"):
        refuse("activation_checkpointing_interval", "nothing is recomputed; give --activation_checkpointing full")
    if config.memory_snapshot and not config.profile:
        raise UserError("--memory_snapshot: records the steps that are profiled; add --profile, or drop the flag")
    for key in ("keep_best", "early_stopping_patience"):
        if getattr(config, key) and config.eval_interval == 0:
            refuse(key, "the run is validated only at its end; give --eval_interval, or drop the flag")
    if config.resume_from_checkpoint == "":
        refuse("resume_from_checkpoint", "is empty; name a step folder, or latest")
    if config.resume_from_checkpoint and config.overwrite:
        raise UserError("--resume_from_checkpoint and --overwrite contradict each other; give one of them")
    if config.delete_newer_checkpoints and config.resume_from_checkpoint is None:
        raise UserError(
            "--delete_newer_checkpoints: deletes the checkpoints newer than the one to resume from; name that one "
            "with --resume_from_checkpoint, or drop the flag"
        )
    if config.allow_changes and config.resume_from_checkpoint is None:
        raise UserError(
            "--allow_changes: only a run that resumes has changes; add --resume_from_checkpoint, or drop it"
        )
    if config.optimizer == "muon" and config.optimized:
        refuse(
            "optimizer",
            "DeepSpeed flattens the matrices, and its own Muon scales and clips differently from PyTorch's, so "
            "layouts would not compute the same; use --run_type baseline (one process, DDP or FSDP2), with the "
            "optimizations as flags: --attn_implementation auto --loss_chunk_size 512 --mixed_precision auto",
        )
    if config.run_type == "baseline":
        if config.deepspeed_config:
            refuse("deepspeed_config", "the baseline is plain PyTorch; drop the flag or use --run_type optimized")
        if config.pipeline_stages is not None and config.pipeline_stages > 1:
            refuse("pipeline_stages", "the baseline has the full model in each process; use --run_type optimized")
