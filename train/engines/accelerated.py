"""The whole model in every process, at least while it computes, through Accelerate: plain, DDP, FSDP2 or ZeRO."""

from collections.abc import Iterable, Iterator
from socket import gethostname
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.documents import kernel_arguments
from train.config import launcher_env as launcher
from train.data.batches import IGNORED_LABEL
from train.engines.base import Engine, StepResult
from train.engines.placement import Place
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks
from train.metrics.annotations import annotate


class AcceleratedEngine(Engine):
    def _take(self, model: GPT2FlashForCausalLM) -> nn.Module:
        mode = self.config.activation_checkpointing
        assert mode is not None
        if mode != "none" and not self.compiler_recomputes:
            checkpoint_blocks(model, checkpoint_arguments(mode))
        if self.config.torch_compile and self.deepspeed and self.deepspeed["zero_optimization"].get("stage") == 3:
            # ZeRO-3 would gather each layer's parameters inside the compiled blocks, and so cut them into pieces.
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [type(model.transformer.h[0])])
        self.module = model
        return model

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        super().prepare(model)
        if self.deepspeed is not None:  # Accelerate calls it at the end of its backward
            self.model.step = annotate("optimizer")(self.model.step)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.module.named_modules()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass alone, as in validation, leaves some whole
        return self.module.named_parameters()

    def _asked_wrapping(self) -> str:
        if self.deepspeed is not None:
            zero = self.deepspeed["zero_optimization"]
            offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
            return _zero(zero.get("stage", 0), offload)
        return "plain" if self.world_size == 1 else "FSDP2" if launcher.asks("FSDP") else "DDP"

    def _place(self) -> Place:
        model: Any = self.model
        if isinstance(model, FSDPModule):
            wrapping = "FSDP2"
        elif isinstance(model, DistributedDataParallel):
            wrapping = "DDP"
        elif self.deepspeed is not None:
            wrapping = _zero(model.zero_optimization_stage(), model.zero_use_cpu_optimizer())
        else:
            wrapping = "plain"
        return Place(self.rank, gethostname(), self.device.type, wrapping, stage=0, data_rank=self.rank)

    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        self.model.train()
        self._begin_step(step, learning_rate)
        losses, grad_norm = [], None
        for micro_batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                with annotate("data"):
                    inputs = self._inputs(micro_batch)
                with annotate("forward"):
                    loss = self.model(**inputs, use_cache=False, skip_logits=True).loss
                    losses.append(loss.detach().float())
                with annotate("backward"):
                    self.accelerator.backward(loss)
                with annotate("optimizer"):
                    if self.accelerator.sync_gradients:
                        limit = self.config.max_grad_norm or float("inf")
                        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        with annotate("communication"):
            mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            if isinstance(grad_norm, DTensor):
                grad_norm = grad_norm.full_tensor()
            return StepResult(mean, None if grad_norm is None else float(grad_norm))

    @torch.no_grad()
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        inputs = self._inputs(batch)
        nll = self.model(**inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        return torch.stack([nll.double(), (inputs["shift_labels"] != IGNORED_LABEL).sum().double()])

    def close(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            # Its reducer would be the last to let go of the process group, which then waits for its own threads with
            # the GIL in hand, and they for the GIL (seen with torch 2.13 over gloo). So the reducer goes first.
            self.accelerator.free_memory()
            del self.model
        super().close()

    def _inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A batch as the model's arguments, on its way to the device."""
        moved: dict[str, Any] = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        if "cu_seq_lens" in moved:
            moved |= kernel_arguments(moved.pop("cu_seq_lens"), batch["input_ids"].shape[1])
        return moved


def _zero(stage: int, offload: bool) -> str:
    return f"ZeRO-{stage}{' with its optimizer on the CPU' * offload}"
