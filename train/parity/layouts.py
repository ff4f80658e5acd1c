"""The layouts and settings that the parity test trains with, as commands of this trainer."""

import sys
from dataclasses import dataclass
from pathlib import Path

from train.config import packaged
from train.parity.reference import CLIP, SEQUENCES, flags


@dataclass(frozen=True)
class LaunchedLayout:
    """A layout as it is launched: processes, launcher, and the number of shares of a global batch."""

    name: str
    processes: int
    data_parallel: int
    accelerate: str | None = None  # the file for `accelerate launch`; None: torchrun, or no launcher for one process
    deepspeed_config: str | None = None
    stages: int = 1

    @property
    def run_type(self) -> str:
        return "optimized" if self.deepspeed_config else "baseline"

    @property
    def argv(self) -> list[str]:
        engine = ["--deepspeed_config", self.deepspeed_config] if self.deepspeed_config else []
        stages = ["--pipeline_stages", str(self.stages)] if self.stages > 1 else []
        return [*self._launcher, "-m", "train", "--run_type", self.run_type, *engine, *stages]

    @property
    def _launcher(self) -> list[str]:
        """Started by this interpreter, so that the package is found where this module was."""
        if self.processes == 1:
            return [sys.executable]
        if self.accelerate is None:
            launch = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d"]
            return [*launch, "--rdzv_endpoint", "localhost:0", "--nproc_per_node", str(self.processes)]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        file = packaged.accelerate_file(self.accelerate)
        return [*launch, "--config_file", str(file), "--num_processes", str(self.processes)]


LAYOUTS = (
    LaunchedLayout("single", 1, 1),
    LaunchedLayout("ddp-x2", 2, 2),
    LaunchedLayout("ddp-x4", 4, 4),
    LaunchedLayout("zero1-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero1.json"),
    LaunchedLayout("zero2-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero2.json"),
    LaunchedLayout("zero3-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero3.json"),
    LaunchedLayout("fsdp2-x2", 2, 2, "fsdp2.yaml"),
    LaunchedLayout("pp2", 2, 1, "deepspeed.yaml", "ds_configs/pipeline.json", 2),
    LaunchedLayout("pp4", 4, 1, "deepspeed.yaml", "ds_configs/pipeline.json", 4),
    LaunchedLayout("pp2-dp2", 4, 2, "deepspeed.yaml", "ds_configs/pipeline.json", 2),
)


@dataclass(frozen=True)
class Case:
    """One run of the parity test."""

    layout: LaunchedLayout
    accumulation: int
    activation_checkpointing: bool
    clipping: bool

    @property
    def max_grad_norm(self) -> float:
        return CLIP if self.clipping else 0.0

    @property
    def label(self) -> str:
        checkpointing = " checkpointing" if self.activation_checkpointing else ""
        return f"{self.layout.name} accumulation {self.accumulation}{checkpointing}{' clipping' * self.clipping}"

    def argv(self, problem: Path, out: Path) -> list[str]:
        """The command that trains this case on the files in `problem` and writes to `out`."""
        micro_batch = SEQUENCES // (self.accumulation * self.layout.data_parallel)
        return [
            *self.layout.argv,
            *flags(problem, self.max_grad_norm),
            f"--train_micro_batch_size_per_gpu={micro_batch}",
            f"--gradient_accumulation_steps={self.accumulation}",
            *(["--activation_checkpointing=full"] if self.activation_checkpointing else []),
            f"--checkpoint_path={out}",
        ]
