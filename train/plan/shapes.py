"""The shape of a model, and a layout of its training with the flags that start it. Sizes are in elements."""

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from modeling_gpt2flash import GPT2FlashConfig
from train.config import packaged
from train.engines.pipeline.partition import parameter_counts

ActivationCheckpointing = Literal["none", "selective", "full"]
DeviceKind = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Shape:
    """The shape of a model, and the tokens of a sequence."""

    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    vocab_size: int
    n_positions: int
    block_size: int

    @classmethod
    def of(cls, config: GPT2FlashConfig, block_size: int) -> "Shape":
        inner = config.n_inner or 4 * config.n_embd
        return cls(
            config.n_layer, config.n_head, config.n_embd, inner, config.vocab_size, config.n_positions, block_size
        )

    @property
    def matrices(self) -> int:
        """Elements of a block's matrices: c_attn 3 D², c_proj D², the MLP's two D · I."""
        return 4 * self.n_embd**2 + 2 * self.n_embd * self.n_inner

    @cached_property
    def layers(self) -> list[int]:
        """Parameters of each layer; those of a tied head are counted in the embeddings and in the head."""
        return parameter_counts(self.n_layer, self.n_embd, self.n_inner, self.vocab_size, self.n_positions)

    @property
    def block(self) -> int:
        return self.layers[1]

    @property
    def vocabulary(self) -> int:
        return self.layers[-1]

    @property
    def parameters(self) -> int:
        """Parameters of the model, with the tied head counted once."""
        return sum(self.layers[:-1])


@dataclass(frozen=True)
class Buckets:
    """ZeRO's buckets in elements, as in the shipped JSONs or by DeepSpeed 0.19's defaults."""

    reduce: int = 100_000_000  # more than the largest parameter: gpt2-xl's vocabulary has 80.4M
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000


@dataclass(frozen=True)
class Layout:
    """How a step is distributed over processes, and what it saves for the backward pass."""

    kind: Literal["single", "ddp", "fsdp2", "zero"]
    world_size: int
    micro_batch: int = 1
    accumulation: int = 1
    zero_stage: int = 0
    offload: bool = False
    stages: int = 1
    activation_checkpointing: ActivationCheckpointing = "none"
    bf16: bool = True
    loss_chunk_size: int = 512
    device: DeviceKind = "gpu"
    buckets: Buckets = field(default_factory=Buckets)
    bounds: tuple[int, ...] = ()  # of the pipeline stages, over embeddings, blocks, final norm and head

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.stages

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast to bf16 when they are used. ZeRO and FSDP2 compute with bf16 weights."""
        return self.bf16 and self.kind in ("single", "ddp")

    @property
    def compute(self) -> int:
        """Bytes of an element that matmuls read and write."""
        return 2 if self.bf16 else 4

    @property
    def run_type(self) -> str:
        return "optimized" if self.kind == "zero" else "baseline"

    @property
    def launcher_flags(self) -> list[str]:
        """The flags of `accelerate launch`; none where `python` starts a single process."""
        if self.kind == "single":
            return []
        name = "deepspeed" if self.kind == "zero" else self.kind
        file = packaged.here_or_shipped(f"{packaged.ACCELERATE}/{name}.yaml", packaged.ACCELERATE)
        return ["--config_file", str(file), "--num_processes", str(self.world_size)]

    @property
    def command(self) -> list[str]:
        """The command that starts it, of this interpreter, so that the package is found where this module was."""
        launcher_flags = self.launcher_flags
        if launcher_flags:
            launcher_flags = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *launcher_flags]
        return [sys.executable, *launcher_flags, "-m", "train", *self.flags]

    @property
    def flags(self) -> list[str]:
        """The flags of `python -m train`, with shipped DeepSpeed JSONs."""
        flags = ["--run_type", self.run_type]
        if self.kind == "zero":
            name = "pipeline" if self.stages > 1 else f"zero{self.zero_stage}{'_offload' * self.offload}"
            flags += ["--deepspeed_config", f"ds_configs/{name}.json"]
        if self.stages > 1:
            flags += ["--pipeline_stages", str(self.stages)]
        flags += ["--train_micro_batch_size_per_gpu", str(self.micro_batch)]
        flags += ["--gradient_accumulation_steps", str(self.accumulation)]
        if self.activation_checkpointing != "none":
            flags += ["--activation_checkpointing", self.activation_checkpointing]
        return flags
