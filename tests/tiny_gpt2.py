"""Small GPT-2s, stock and ours, and inputs for them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM

SIZES = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = SIZES | NO_DROPOUT | {"initializer_range": 0.2}  # wide enough that logits and their errors are not all tiny


def make_pair(folder: Path, attention: str = "sdpa", **fields) -> tuple[GPT2LMHeadModel, GPT2FlashForCausalLM]:
    """Stock GPT-2 with random weights, and ours loaded from its folder."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**TINY | fields))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("bias"):  # initialised to 0, which would hide a bias that is not added
                parameter.normal_(std=0.1)
    stock.save_pretrained(folder)
    stock.set_attn_implementation(attention)
    return stock.eval(), GPT2FlashForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def make_ours(**fields) -> GPT2FlashForCausalLM:
    torch.manual_seed(0)
    return GPT2FlashForCausalLM(GPT2FlashConfig(**TINY | fields)).eval()


def tokens(batch: int = 2, length: int = 12, words: int = 37, seed: int = 1) -> Tensor:
    return torch.randint(1, words, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad(ids: Tensor, amounts: list[int], side: str) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and mask, of which row i keeps its first T - amounts[i] tokens, padded on a side."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, amount in enumerate(amounts):
        kept = ids[row, : ids.shape[1] - amount].clone()
        gap, rest = (
            (slice(0, amount), slice(amount, None))
            if side == "left"
            else (slice(len(kept), None), slice(0, len(kept)))
        )
        ids[row, gap], mask[row, gap] = 0, 0
        ids[row, rest] = kept
    return ids, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def sgd_losses(
    model: torch.nn.Module, mean_loss: Callable[[], Tensor], steps: int, learning_rate: float
) -> list[float]:
    """The losses of plain steps, the last of which is below the first."""
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for _ in range(steps):
        loss = mean_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def save_like_a_run(folder: Path, tokenizer_of: Path, **fields) -> GPT2FlashForCausalLM:
    """Ours in a folder as runs leave them, weights, code and tokenizer; the tokenizer is that of another folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    ours = make_ours(vocab_size=len(tokenizer), n_positions=64, **fields)
    ours.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ours
