"""The whole model in every process, through Accelerate: plain PyTorch, DDP, or DeepSpeed's ZeRO."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.batches import IGNORED_LABEL
from train.engines.base import Engine, StepResult


class AcceleratedEngine(Engine):
    def _take(self, model: GPT2FlashForCausalLM) -> nn.Module:
        if self.config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.module = model
        return model

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.module.named_parameters()

    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        self.model.train()
        self._begin_step(step, learning_rate)
        losses, grad_norm = [], None
        for micro_batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**self._on_device(micro_batch), use_cache=False, skip_logits=True).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    limit = self.config.max_grad_norm or float("inf")
                    grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach().float())
        mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        return StepResult(mean, None if grad_norm is None else float(grad_norm))

    @torch.no_grad()
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        batch = self._on_device(batch)
        nll = self.model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        return torch.stack([nll.double(), (batch["shift_labels"] != IGNORED_LABEL).sum().double()])

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
