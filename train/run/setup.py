"""A run made ready: everything settled and checked from files first, then the engine with the model in it."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig
from modeling_gpt2flash.attention import choose_attention
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import default_learning_rate, default_tokenizer, load_model, model_config, own_tokenizer
from train.config import deepspeed_config as deepspeed_json
from train.config import launcher_env as launcher
from train.config.run_config import DEFAULTS, RunConfig
from train.data.batches import EvalBatches, TrainBatches
from train.data.token_file import open_tokens
from train.data.tokenizer import TOKENIZER_NAME, gpt2_encoding
from train.engines import rendezvous
from train.engines.accelerated import AcceleratedEngine
from train.engines.accelerator import world_size
from train.engines.base import Engine
from train.engines.pipeline.partition import Partition, partition
from train.engines.transforms import SELECTIVE_ATTENTION
from train.hub import __main__ as hub
from train.run import trackers
from train.utils import processes
from train.utils.compilers import check_cpp_compiler
from train.utils.devices import device_type, has_fast_bf16, has_memory_history
from train.utils.errors import UserError

PROBE = "Tokenizers that cut this sentence alike, its (few) signs and\n 2 lines too, are held to be the same."
SHAPE = ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size")


@dataclass(frozen=True)
class Run:
    """A settled run: no number left open, every file there and fitting, nothing written and nothing built yet."""

    config: RunConfig
    deepspeed: dict[str, Any] | None
    model_config: GPT2FlashConfig
    own_tokenizer: PreTrainedTokenizerBase | None  # of the weights that the run starts from
    attention: tuple[str, str]  # implementation, why
    train: TrainBatches
    val: EvalBatches
    partition: Partition | None  # None without a pipeline
    micro_batch_size: int  # sequences per data-parallel process
    accumulation: int  # micro-batches per step
    total_steps: int
    warmup_steps: int
    checkpoint: checkpoints.Checkpoint | None
    restarted: bool  # by the launcher, in the run folder of this job's earlier attempt

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.block_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's own, else GPT-2's where the vocabulary has room for it."""
        return self.own_tokenizer or default_tokenizer(self.model_config)

    @property
    def shape(self) -> dict[str, int | None]:
        return {key: getattr(self.model_config, key) for key in SHAPE}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps says of its run, besides weights and moments."""
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "model": self.shape,
            "train_data": self.train.identity(),
            "seed": self.config.seed,
            "block_size": self.train.block_size,
            "document_mask": self.config.document_mask,
            "sequences_per_step": self.train.global_batch_size,
            "optimizer": self.config.optimizer,
            "total_steps": self.total_steps,
            "config": dataclasses.asdict(self.config),
        }


def settle(config: RunConfig) -> Run:
    """Check everything that can be checked from the flags and files.

    Raises:
        UserError: naming what cannot be, before anything is written or built.
    """
    trackers.check(config.report_to)
    if config.push_to_hub is not None and processes.rank() == 0:
        hub.check(config.push_to_hub)
    restarted = rendezvous.is_claimed(config.run_folder)
    if restarted:
        config = _go_on(config)
    if config.learning_rate is None:
        config = dataclasses.replace(config, learning_rate=default_learning_rate(config.model))
    config, deepspeed = _settle_engine(config)
    micro_batch_size, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    assert micro_batch_size is not None
    assert accumulation is not None
    assert config.loss_chunk_size is not None
    resume = config.resume_from_checkpoint
    checkpoint = checkpoints.find(resume, config.run_folder) if resume else None
    continuing = checkpoint is not None and checkpoint.folder.parent.resolve() == config.run_folder.resolve()
    checkpoints.check_free(config.run_folder, continuing or restarted, config.overwrite)

    shape = model_config(config.model, dropout=config.dropout, loss_chunk_size=config.loss_chunk_size)
    block_size = config.block_size or shape.n_positions
    if block_size > shape.n_positions:
        raise UserError(
            f"--block_size {block_size}: {config.model} has {shape.n_positions} positions; ask for that many or fewer"
        )
    tokenizer = own_tokenizer(config.model, shape.n_positions)
    encode = gpt2_encoding().encode_ordinary if tokenizer is None else tokenizer.encode
    prompt_length = len(encode(config.prompt))
    if config.max_new_tokens > 0 and prompt_length >= shape.n_positions:
        raise UserError(
            f"--prompt: its {prompt_length} tokens leave no room in the {shape.n_positions} positions of "
            f"{config.model}; shorten it"
        )
    if config.torch_compile and device_type() == "cpu":
        check_cpp_compiler("--torch_compile")
    stages = config.pipeline_stages
    assert stages is not None
    if stages == 1 and config.pipeline_schedule != "1f1b":
        raise UserError(f"--pipeline_schedule {config.pipeline_schedule}: there is one stage; give --pipeline_stages")
    if stages == 1 and config.activation_checkpointing_interval != 1:
        raise UserError(
            f"--activation_checkpointing_interval {config.activation_checkpointing_interval}: without a pipeline each "
            "block is recomputed by itself; write 1 (in the JSON too), or give --pipeline_stages"
        )
    sequences = micro_batch_size * accumulation * (world_size() // stages)
    attention = _settle_attention(config, shape)
    if config.activation_checkpointing == "selective":
        _check_selective(config, attention[0])
    cut = _settle_partition(config, deepspeed, shape, block_size) if stages > 1 else None
    train = _settle_training_data(config, shape.vocab_size, block_size, sequences)
    if tokenizer is not None:
        _check_same_tokens(config, tokenizer, train)
    val = EvalBatches(open_tokens(config.val_data_path, shape.vocab_size), block_size, config.document_mask)
    total_steps = config.max_steps or train.updates(config.epochs)
    _check_profile(config, total_steps)
    run = Run(
        config=dataclasses.replace(config, block_size=block_size),
        deepspeed=deepspeed,
        model_config=shape,
        own_tokenizer=tokenizer,
        attention=attention,
        train=train,
        val=val,
        partition=cut,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        total_steps=total_steps,
        warmup_steps=min(2000, total_steps // 20) if config.warmup_steps is None else config.warmup_steps,
        checkpoint=checkpoint,
        restarted=restarted,
    )
    if run.checkpoint is not None:
        checkpoints.check_same_run(run.checkpoint, run.state(run.checkpoint.step))
        # After a restart the summary is written again: the processes may have ended in the middle of it.
        finished = not continuing or ((config.run_folder / "metrics.json").exists() and not restarted)
        if run.checkpoint.step > total_steps or (run.checkpoint.step == total_steps and finished):
            raise UserError(
                f"{run.checkpoint.folder} has done all {total_steps} steps; ask for more with --max_steps or --epochs"
            )
    return run


def _check_profile(config: RunConfig, total_steps: int) -> None:
    if config.memory_snapshot and not has_memory_history():
        raise UserError("--memory_snapshot: the allocator keeps its history on CUDA devices only; drop the flag")
    if config.profiled is not None and config.profiled.stop - 1 > total_steps:
        raise UserError(
            f"--profile_steps {config.profile_steps}: the run has {total_steps} steps; name earlier ones, or give "
            "more with --max_steps or --epochs"
        )


def _go_on(config: RunConfig) -> RunConfig:
    """The flags of a restarted run: from its last whole checkpoint, else from where it began."""
    own = "latest" if (config.run_folder / checkpoints.LATEST).exists() else config.resume_from_checkpoint
    return dataclasses.replace(config, overwrite=False, resume_from_checkpoint=own)


def _settle_engine(config: RunConfig) -> tuple[RunConfig, dict[str, Any] | None]:
    """Fill in what the run type, the hardware and the DeepSpeed JSON decide."""
    bf16_is_fast = has_fast_bf16()
    if config.optimized:
        launchers = launcher.deepspeed_config_file()
        if launchers not in (None, config.deepspeed_config or launchers):
            raise UserError(
                f"--deepspeed_config {config.deepspeed_config}: the launcher's deepspeed_config_file is {launchers}; "
                "name one of them"
            )
        config = dataclasses.replace(config, deepspeed_config=config.deepspeed_config or launchers)
        config, deepspeed = deepspeed_json.resolve(config, world_size(), bf16_is_fast)
    else:
        deepspeed = None
        bf16 = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and bf16_is_fast)
        config = dataclasses.replace(config, mixed_precision="bf16" if bf16 else "no")
    open_flags = {key: value for key, value in DEFAULTS[config.run_type].items() if getattr(config, key) is None}
    return dataclasses.replace(config, **open_flags), deepspeed


def _settle_training_data(config: RunConfig, vocab_size: int, block_size: int, sequences: int) -> TrainBatches:
    tokens = open_tokens(config.train_data_path, vocab_size)
    return TrainBatches(tokens, block_size, sequences, config.seed, config.document_mask)


def _check_same_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase, train: TrainBatches) -> None:
    """Refuse data of GPT-2's tokens for a model that has others: every id fits, and none means what it did."""
    gpt2s = train.tokens.sidecar is not None and train.tokens.sidecar.tokenizer == TOKENIZER_NAME
    if gpt2s and tokenizer.encode(PROBE, add_special_tokens=False) != gpt2_encoding().encode_ordinary(PROBE):
        raise UserError(
            f"--train_data_path {config.train_data_path}: holds GPT-2's tokens, and {config.model} has a tokenizer of "
            "its own; write its ids to a .bin of uint16 without a sidecar, or start from another model"
        )


def _settle_attention(config: RunConfig, shape: GPT2FlashConfig) -> tuple[str, str]:
    assert config.attn_implementation is not None
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    try:
        return choose_attention(
            config.attn_implementation,
            device_type(),
            dtype,
            shape.n_embd // shape.n_head,
            dropout=shape.attn_pdrop,
        )
    except ValueError as error:
        raise UserError(f"--attn_implementation {config.attn_implementation}: {error}") from None


def _check_selective(config: RunConfig, attention: str) -> None:
    asked = "--activation_checkpointing selective"
    if attention not in SELECTIVE_ATTENTION:
        raise UserError(
            f"{asked}: PyTorch cannot tell the output of {attention} attention from other tensors; give "
            f"--attn_implementation {' or '.join(SELECTIVE_ATTENTION)}"
        )
    if config.dropout > 0:
        # A kernel that does not run again draws no random numbers, so the dropouts after it would draw others.
        raise UserError(
            f"{asked}: with --dropout {config.dropout} the recomputed dropout masks would differ; give --dropout 0"
        )


def _settle_partition(
    config: RunConfig, deepspeed: dict[str, Any] | None, shape: GPT2FlashConfig, block_size: int
) -> Partition:
    assert deepspeed is not None
    assert config.pipeline_stages is not None
    assert config.gradient_accumulation_steps is not None
    stages, asked = config.pipeline_stages, f"--pipeline_stages {config.pipeline_stages}"
    if config.pipeline_schedule == "dualpipev":
        stages, asked = 2 * stages, f"{asked} --pipeline_schedule dualpipev"
        if config.gradient_accumulation_steps < stages:
            raise UserError(
                f"{asked}: needs --gradient_accumulation_steps {stages} or more (two for each of the "
                f"{config.pipeline_stages}), not {config.gradient_accumulation_steps}"
            )
    try:
        return partition(shape, stages, deepspeed["pipeline"]["partition"], block_size=block_size)
    except ValueError as error:
        raise UserError(f"{asked}: {error}") from None


def build(run: Run) -> Engine:
    """The engine with the model in it, at the step of the run's checkpoint; the run folder is this run's from here."""
    rendezvous.join()
    engine = _create_engine(run)
    processes.watch_peer(gather_object([os.getpid()]))
    checkpoint = run.checkpoint
    seen = gather_object([json.dumps(run.state(checkpoint.step if checkpoint else 0), sort_keys=True)])
    if len(set(seen)) > 1:
        raise UserError(
            "the processes do not see the same flags, data or checkpoint; "
            "give all machines the same command and the same folders"
        )
    set_seed(run.config.seed)
    model = load_model(run.config.model, run.model_config, attn_implementation=run.attention[0])
    tensors = checkpoints.read_tensors(checkpoint, model) if checkpoint else None
    engine.wait()  # until everything is read, for what is claimed may be emptied
    if engine.is_main:
        checkpoints.claim(run.config.run_folder, checkpoint, run.config.overwrite)
        rendezvous.claim(run.config.run_folder)
        if run.restarted:
            start = f"goes on from {checkpoint.folder}" if checkpoint else "begins anew: there was no checkpoint"
            print(f"restarted by the launcher: the run {start}", flush=True)
    engine.wait()
    engine.prepare(model)
    if checkpoint is not None and tensors is not None:
        engine.load_state(*tensors, checkpoint.step)
    return engine


def _create_engine(run: Run) -> Engine:
    if run.partition is None:
        return AcceleratedEngine(run.config, run.deepspeed)
    assert run.deepspeed is not None
    from train.engines.pipeline.engine import PipelinedEngine  # imports DeepSpeed, which takes seconds

    return PipelinedEngine(run.config, run.deepspeed, run.partition)
