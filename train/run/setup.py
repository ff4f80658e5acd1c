"""Resolve a run: every open flag gets its value, every file is opened and checked, nothing is written or built yet.

The parts are resolved in this order: engine (run type, launcher, DeepSpeed JSON, hardware), start (run folder and
checkpoint), model, data. What needs no file is refused before the first one is opened.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from modeling_gpt2flash.attention import choose_attention
from train import trackers
from train.checkpoints import starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import (
    check_size,
    default_learning_rate,
    default_tokenizer,
    model_config,
    own_tokenizer,
)
from train.config import deepspeed_config as deepspeed_json
from train.config import launcher_env as launcher
from train.config.arguments import LARGEST
from train.config.changes import SETTING
from train.config.run_config import DEFAULTS, RunConfig
from train.data.batches import EvalBatches, TrainBatches
from train.data.token_file import open_tokens
from train.data.tokenizer import TOKENIZER_NAME, gpt2_encoding
from train.engines.pipeline.partition import Partition, partition
from train.engines.transforms import SELECTIVE_ATTENTION, check_cpp_compiler
from train.hub import upload
from train.job import rendezvous
from train.metrics.hardware import versions
from train.optim.schedule import default_warmup_steps, learning_rate
from train.utils import lock, processes
from train.utils.devices import device_type, has_fast_bf16, has_memory_history, matmul_precision
from train.utils.errors import UserError
from train.utils.units import in_unit

PROBE = (
    "Two tokenizers that split this (short) sentence alike, with its symbols and\n 2 lines, are taken to be the same."
)
SAVE_MINUTES = 30.0  # by default; a save costs seconds
BYTES_PER_TOKEN = 16  # of a batch: input_ids and shift_labels in int64
SHAPE = ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")


@dataclass(frozen=True)
class ResolvedRun:
    """A run without open flags, whose files are all there and fit together."""

    config: RunConfig
    deepspeed: dict[str, Any]  # DeepSpeed's JSON without any "auto"; empty in a baseline
    start: starting.Start  # in its folder
    restarted: bool  # by the launcher, in the run folder of an earlier attempt of this job
    model: GPT2FlashConfig
    own_tokenizer: PreTrainedTokenizerBase | None  # that of the weights from which the run starts
    attention: tuple[str, str]  # implementation, why
    partition: Partition | None  # None without a pipeline
    train: TrainBatches
    val: EvalBatches
    total_steps: int
    warmup_steps: int

    @property
    def checkpoint(self) -> checkpoints.Checkpoint | None:
        """The checkpoint from which it resumes."""
        return self.start.checkpoint

    @property
    def precision(self) -> str:
        """What matmuls run in: "bf16", "tf32" or "fp32"."""
        return matmul_precision(self.config.mixed_precision, self.config.optimized)

    @property
    def first_step(self) -> int:
        """The number of steps that are done already."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.block_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's own, else GPT-2's if the vocabulary has room for it."""
        return self.own_tokenizer or default_tokenizer(self.model)

    @property
    def shape(self) -> dict[str, int | None]:
        return {key: getattr(self.model, key) for key in SHAPE}

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.config.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            min_ratio=self.config.min_learning_rate_ratio,
            schedule=self.config.lr_schedule,
        )

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments, in fp32."""
        with torch.device("meta"):
            return 12 * GPT2FlashForCausalLM(self.model).num_parameters()

    def state(
        self,
        step: int,
        guard: checkpoints.GuardState | None = None,
        *,
        temporary: bool = False,
        stopped_by_guard: bool = False,
    ) -> checkpoints.TrainingState:
        """The state to checkpoint after `step` steps."""
        return checkpoints.TrainingState(
            step=step,
            tokens=step * self.tokens_per_step,
            model=self.shape,
            train_data=self.train.tokens.identity,
            val_data=self.val.tokens.identity,
            seed=self.config.seed,
            block_size=self.train.block_size,
            document_mask=self.config.document_mask,
            sequences_per_step=self.train.global_batch_size,
            optimizer=self.config.optimizer,
            guard=guard,
            temporary=temporary,
            stopped_by_guard=stopped_by_guard,
            total_steps=self.total_steps,
            config=asdict(self.config),
            setting=self.setting,
        )

    @property
    def setting(self) -> dict[str, Any]:
        """What hardware, launcher and installation decide of its numbers."""
        sharding = "FSDP2" if launcher.asks("FSDP") else "none"
        if self.config.optimized:
            sharding = f"ZeRO-{self.deepspeed['zero_optimization']['stage']}"
        own = {
            "processes": processes.world_size(),
            "sharding": sharding,
            "stage_bounds": list(self.partition.bounds) if self.partition else [],
            "attention": self.attention[0],
        }
        known = versions()
        return own | {"precision": self.precision} | {name: known[name] for name in SETTING if name in known}


def own_run_folder(config: RunConfig) -> AbstractContextManager[None]:
    """A context in which no other run can write to the run folder. Of the processes of a job, the main one owns it.

    Raises:
        UserError: on entering it, if another run does; or if it is gone since an earlier attempt of this job.
    """
    if processes.rank() != 0:
        return nullcontext()
    restarted = rendezvous.is_claimed(config.run_folder)
    if restarted and not config.run_folder.is_dir():
        raise UserError(
            f"--checkpoint_path {config.checkpoint_path}: {config.run_folder} was removed or renamed while this job "
            "was writing to it; start again, or resume from the step folders where they are now"
        )
    return lock.owned(config.run_folder, "--checkpoint_path", job=rendezvous.job_id(), restarted=restarted)


def resolve(config: RunConfig) -> ResolvedRun:
    """Resolve everything that flags and files decide; refuse what is impossible."""
    check_environment(config)
    restarted = rendezvous.is_claimed(config.run_folder)
    rendezvous.refuse_after_guard_stop()
    if restarted:  # from its last complete checkpoint, else from where it started
        own = "latest" if starting.has_checkpoint(config.run_folder) else config.resume_from_checkpoint
        config = replace(config, overwrite=False, delete_newer_checkpoints=False, resume_from_checkpoint=own)
    config, deepspeed = resolve_engine(config)
    start = resolve_start(config)
    model = model_config(config.model, dropout=config.dropout, loss_chunk_size=config.loss_chunk_size)
    check_size(config.model, model, machines=processes.machines())
    config = replace(config, block_size=config.block_size or model.n_positions)
    tokenizer = resolve_tokenizer(config, model)
    attention = resolve_attention(config, model)
    stages = resolve_partition(config, deepspeed, model)
    train, val = resolve_data(config, model, tokenizer)
    total_steps = config.max_steps or train.updates(config.epochs)
    if total_steps > LARGEST:
        raise UserError(f"--epochs {config.epochs:g}: these are more steps than can be counted; ask for fewer")
    if config.profiled is not None and config.profiled.stop - 1 > total_steps:
        raise UserError(
            f"--profile_steps {config.profile_steps}: the run has {total_steps} steps; name earlier ones, or give "
            "more with --max_steps or --epochs"
        )
    run = ResolvedRun(
        config=config,
        deepspeed=deepspeed,
        start=start,
        restarted=restarted,
        model=model,
        own_tokenizer=tokenizer,
        attention=attention,
        partition=stages,
        train=train,
        val=val,
        total_steps=total_steps,
        warmup_steps=default_warmup_steps(total_steps) if config.warmup_steps is None else config.warmup_steps,
    )
    if start.checkpoint is not None:
        check_checkpoint(run, start.checkpoint)
    return run


def check_environment(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before any file is opened."""
    trackers.check(config.trackers)
    if config.push_to_hub is not None and processes.rank() == 0:
        upload.check(config.push_to_hub)
    if config.torch_compile and device_type() == "cpu":
        check_cpp_compiler("--torch_compile")
    if config.memory_snapshot and not has_memory_history():
        raise UserError("--memory_snapshot: the allocator keeps its history on CUDA devices only; drop the flag")


def resolve_engine(config: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The flags that run type, launcher, hardware and DeepSpeed JSON decide, and the JSON without any "auto"."""
    bf16_is_fast = has_fast_bf16()
    deepspeed: dict[str, Any] = {}
    if config.optimized:
        file = launcher.deepspeed_config_file()
        if file not in (None, config.deepspeed_config or file):
            raise UserError(
                f"--deepspeed_config {config.deepspeed_config}: the launcher's deepspeed_config_file is {file}; "
                "name one of them"
            )
        config = replace(config, deepspeed_config=config.deepspeed_config or file)
        config, deepspeed = deepspeed_json.resolve(config, processes.world_size(), bf16_is_fast)
    else:
        bf16 = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and bf16_is_fast)
        config = replace(config, mixed_precision="bf16" if bf16 else "no")
    defaults = DEFAULTS[config.run_type] | {
        "learning_rate": default_learning_rate(config.model),
        "save_minutes": 0.0 if config.save_interval else SAVE_MINUTES,
    }
    config = replace(config, **{key: value for key, value in defaults.items() if getattr(config, key) is None})
    if config.pipeline_stages == 1 and config.pipeline_schedule != "1f1b":
        raise UserError(f"--pipeline_schedule {config.pipeline_schedule}: there is one stage; give --pipeline_stages")
    if config.pipeline_stages == 1 and config.activation_checkpointing_interval != 1:
        raise UserError(
            f"--activation_checkpointing_interval {config.activation_checkpointing_interval}: without a pipeline each "
            "block is recomputed by itself; write 1 (in the JSON too), or give --pipeline_stages"
        )
    return config, deepspeed


def resolve_start(config: RunConfig) -> starting.Start:
    """The checkpoint to resume from; refuses a run folder that holds another run."""
    model = Path(config.model)
    if config.overwrite and model.exists() and model.resolve().is_relative_to(config.run_folder.resolve()):
        raise UserError(
            f"--model {config.model}: --overwrite deletes it before the run has a checkpoint; name another "
            "--checkpoint_path"
        )
    return starting.decide(
        config.run_folder, config.resume_from_checkpoint, config.overwrite, config.delete_newer_checkpoints
    )


def resolve_tokenizer(config: RunConfig, model: GPT2FlashConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the weights to start from; refuses blocks and prompts for which there are no positions."""
    if config.block_size > model.n_positions:
        raise UserError(
            f"--block_size {config.block_size}: {config.model} has {model.n_positions} positions; ask for that many "
            "or fewer"
        )
    tokenizer = own_tokenizer(config.model, model.n_positions)
    encode = gpt2_encoding().encode_ordinary if tokenizer is None else tokenizer.encode
    prompt_length = len(encode(config.prompt))
    if config.max_new_tokens > 0 and prompt_length >= model.n_positions:
        raise UserError(
            f"--prompt: its {prompt_length} tokens leave no room in the {model.n_positions} positions of "
            f"{config.model}; shorten it"
        )
    return tokenizer


def resolve_attention(config: RunConfig, model: GPT2FlashConfig) -> tuple[str, str]:
    """The implementation of attention, and why it was chosen."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    try:
        attention = choose_attention(
            config.attn_implementation, device_type(), dtype, model.n_embd // model.n_head, dropout=model.attn_pdrop
        )
    except ValueError as error:
        raise UserError(f"--attn_implementation {config.attn_implementation}: {error}") from None
    if config.activation_checkpointing == "selective":
        if attention[0] not in SELECTIVE_ATTENTION:
            raise UserError(
                f"--activation_checkpointing selective: PyTorch cannot tell the output of {attention[0]} attention "
                f"from other tensors; give --attn_implementation {' or '.join(SELECTIVE_ATTENTION)}"
            )
        if config.dropout > 0:
            # A kernel that does not run again draws no random numbers, so later dropouts would draw different ones.
            raise UserError(
                f"--activation_checkpointing selective: with --dropout {config.dropout} the recomputed dropout masks "
                "would differ; give --dropout 0"
            )
    return attention


def resolve_partition(config: RunConfig, deepspeed: dict[str, Any], model: GPT2FlashConfig) -> Partition | None:
    """The layers of each pipeline stage; None without a pipeline."""
    if config.pipeline_stages == 1:
        return None
    stages, asked = config.pipeline_stages, f"--pipeline_stages {config.pipeline_stages}"
    if config.pipeline_schedule == "dualpipev":
        stages, asked = 2 * stages, f"{asked} --pipeline_schedule dualpipev"
        if config.gradient_accumulation_steps < stages:
            raise UserError(
                f"{asked}: needs --gradient_accumulation_steps {stages} or more (two for each of the "
                f"{config.pipeline_stages}), not {config.gradient_accumulation_steps}"
            )
    try:
        return partition(model, stages, deepspeed["pipeline"]["partition"], block_size=config.block_size)
    except ValueError as error:
        raise UserError(f"{asked}: {error}") from None


def resolve_data(
    config: RunConfig, model: GPT2FlashConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[TrainBatches, EvalBatches]:
    """The batches of training and validation, whose token ids the model's vocabulary contains."""
    tokens = open_tokens(config.train_data_path, model.vocab_size)
    data_parallel = processes.world_size() // config.pipeline_stages
    sequences_per_step = config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps * data_parallel
    own = config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps
    needed = own * config.block_size * BYTES_PER_TOKEN
    if needed > (there_is := psutil.virtual_memory().total):
        raise UserError(
            f"--train_micro_batch_size_per_gpu {config.train_micro_batch_size_per_gpu:,} "
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps:,}: the tokens of a step alone take "
            f"{in_unit('bytes', needed)}, and this machine has {in_unit('bytes', there_is)}; ask for fewer sequences"
        )
    train = TrainBatches(tokens, config.block_size, sequences_per_step, config.seed, config.document_mask)
    gpt2s = tokens.sidecar is not None and tokens.sidecar.tokenizer == TOKENIZER_NAME
    if gpt2s and tokenizer is not None:
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        if ids != gpt2_encoding().encode_ordinary(PROBE):  # the model knows every id, under other meanings
            raise UserError(
                f"--train_data_path {config.train_data_path}: holds GPT-2's tokens, and {config.model} has a "
                "tokenizer of its own; write its ids to a .bin of uint16 without a sidecar, or start from another "
                "model"
            )
    val_tokens = open_tokens(config.val_data_path, model.vocab_size)
    return train, EvalBatches(val_tokens, config.block_size, config.document_mask)


def check_checkpoint(run: ResolvedRun, checkpoint: checkpoints.Checkpoint) -> None:
    """Refuse to resume another run, or one that has no steps left."""
    starting.check_same_run(checkpoint, run.state(checkpoint.step))
    # After a restart the summary is written again: the processes may have ended in the middle of it.
    summarized = (run.config.run_folder / "metrics.json").exists() and not run.restarted
    finished = summarized or not checkpoint.is_in(run.config.run_folder)
    if checkpoint.step > run.total_steps or (checkpoint.step == run.total_steps and finished):
        raise UserError(
            f"{checkpoint.folder} has done all {run.total_steps} steps; ask for more with --max_steps or --epochs"
        )
    starting.check_changes(checkpoint, run.state(checkpoint.step), allowed=run.config.allow_changes or run.restarted)
