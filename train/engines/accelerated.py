"""The engine of every layout without a pipeline, through Accelerate: a single process, DDP, FSDP2 or ZeRO."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.documents import kernel_arguments
from train.config import launcher_env as launcher
from train.data.batches import IGNORED_LABEL
from train.engines import zero
from train.engines.base import Engine
from train.engines.gradient_clipping import clip
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks
from train.metrics.annotations import annotate


class AcceleratedEngine(Engine):
    def _build_module(self, model: GPT2FlashForCausalLM) -> nn.Module:
        mode = self.config.activation_checkpointing
        if mode != "none" and not self.compiles_checkpointing:
            checkpoint_blocks(model, checkpoint_arguments(mode))
        if self.config.torch_compile and self.deepspeed:
            zero.gather_blocks_as_a_unit(model, self.deepspeed)
        self.module = model
        return model

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        super().prepare(model)
        if self.deepspeed:  # Accelerate calls it at the end of its backward
            self.model.step = annotate("optimizer")(self.model.step)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.module.named_modules()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward pass, as in validation, leaves some unsharded
        return self.module.named_parameters()

    def _requested_wrapping(self) -> str:
        if self.deepspeed:
            return zero.requested_name(self.deepspeed)
        return "plain" if self.world_size == 1 else "FSDP2" if launcher.asks("FSDP") else "DDP"

    def _placement(self) -> tuple[str, int, int]:
        model: Any = self.model
        if isinstance(model, FSDPModule):
            wrapping = "FSDP2"
        elif isinstance(model, DistributedDataParallel):
            wrapping = "DDP"
        elif self.deepspeed:
            wrapping = zero.name(model.zero_optimization_stage(), model.zero_use_cpu_optimizer())
        else:
            wrapping = "plain"
        return wrapping, 0, self.rank

    def _compute_step(self, micro_batches: Iterable[dict[str, torch.Tensor]]) -> None:
        self.model.train()
        for micro_step, micro_batch in enumerate(micro_batches):
            self.seed_dropout(micro_step)
            with self.accelerator.accumulate(self.model):
                with annotate("data"):
                    inputs = self._inputs(micro_batch)
                with annotate("forward"):
                    loss = self.model(**inputs, use_cache=False, skip_logits=True).loss
                    self.losses.append(loss.detach().float())
                with annotate("backward"):
                    self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and not self.deepspeed:  # whose step is part of its backward
                    with annotate("optimizer"):
                        if self._review(clip(self.accelerator, self.model.parameters(), self.config.max_grad_norm)):
                            self.optimizer.step()
                        self.optimizer.zero_grad()

    def _gather_losses(self, requests: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        own = torch.stack([torch.stack(self.losses).mean(), *requests])
        loss, *asked = self.accelerator.reduce(own, "mean")
        return loss, asked

    @torch.no_grad()
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        inputs = self._inputs(batch)
        nll = self.model(**inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        return torch.stack([nll.double(), (inputs["shift_labels"] != IGNORED_LABEL).sum().double()])

    def close(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            # DDP's reducer would hold the last reference to the process group, whose destructor waits for its threads
            # while it holds the GIL, which they need (seen with torch 2.13 over gloo). So delete the reducer first.
            self.accelerator.free_memory()
            del self.model
        super().close()

    def _inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A batch as the model's arguments, being copied to the device."""
        moved: dict[str, Any] = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        if "cu_seq_lens" in moved:
            moved |= kernel_arguments(moved.pop("cu_seq_lens"), batch["input_ids"].shape[1])
        return moved
